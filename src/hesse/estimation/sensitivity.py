"""How much the end loss feels each layer's output: a walk from the last block back to the first."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hesse.curvature.losses import sampled_labels
from hesse.errors import DataError
from hesse.models.network import Block, Network
from hesse.models.stream import Flow, finish


def output_sensitivities(
    network: Network, flows: list[Flow], inputs: list[list[Tensor]], seed: int, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """The diagonal of each layer's output factor: E[g²] per output (out,), in nats per token.

    g is the gradient of a sequence's summed loss at the layer's output, with labels sampled from the model: the true
    Fisher, one sample a token, positions taken as independent (K-FAC expand, Martens and Grosse, 2015; Eschenhagen et
    al., 2023). With the Gram of the layer's inputs it gives the loss increase of a change d as
    ½ Σ_i E[g_i²] d_i E[xxᵀ] d_iᵀ. An encoder's loss is ½‖h - h₀‖² of its last hidden states, so a unit-variance
    Gaussian's nats.

    `flows` have passed all blocks; `inputs[k]` are the hidden states that reached block k, one tensor a flow. Memory:
    one block and its activations for one flow, besides `inputs`. `advance` is called after each block.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients, count = [], 0
    with network.surroundings() as model:
        for flow in flows:
            flow.hidden = flow.hidden.detach().requires_grad_()
            loss, tokens = _sampled_loss(network, finish(network, model, flow), generator)
            (gradient,) = torch.autograd.grad(loss, flow.hidden)
            flow.hidden = flow.hidden.detach()
            gradients.append(gradient)
            count += tokens
    advance()
    squares: dict[str, Tensor] = {}
    for index in reversed(range(len(network.blocks))):
        block = network.blocks[index]
        with network.loaded(block):
            gradients = [
                _through(block, index, flow, hidden, gradient, squares)
                for flow, hidden, gradient in zip(flows, inputs[index], gradients, strict=True)
            ]
        advance()
    return {name: square / count for name, square in squares.items()}


def _sampled_loss(network: Network, output: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """The summed loss of labels drawn from the model itself, and the number of tokens it is summed over."""
    output = output.float()
    if not bool(torch.isfinite(output).all()):
        raise DataError(
            f"the output of {type(network.model).__name__} holds NaN or infinity: its last norm or its head overflows "
            "on this data"
        )
    if network.kind == "encoder":
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return (output * noise).sum(), output.shape[0] * output.shape[1]
    predicted = output[:, :-1].flatten(0, 1)
    labels = sampled_labels(predicted.detach(), generator)
    return nn.functional.cross_entropy(predicted, labels, reduction="sum"), len(labels)


def _through(
    block: Block, index: int, flow: Flow, hidden: Tensor, gradient: Tensor, squares: dict[str, Tensor]
) -> Tensor:
    """Carry `gradient` from the block's output to its input, adding up squared gradients at its layers' outputs."""

    def note(name: str, gradient: Tensor) -> None:
        if not gradient.numel():  # an expert that no token of this flow reached
            return
        square = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)
        squares[name] = squares.get(name, torch.zeros_like(square)) + square

    def watch(name: str, module: nn.Module, arguments: object, output: Tensor) -> None:
        # A hook on the tensor, not on the module: some blocks go on to change the output in place.
        if output.requires_grad:
            output.register_hook(partial(note, name))  # type: ignore[no-untyped-call]

    hooks = [layer.module.register_forward_hook(partial(watch, layer.name)) for layer in block.layers]
    try:
        flow.hidden = hidden.detach().requires_grad_()
        (back,) = torch.autograd.grad(flow.through(block.module, index), flow.hidden, gradient)
    finally:
        flow.hidden = flow.hidden.detach()
        for hook in hooks:
            hook.remove()
    return back
