"""The gradient of the end loss through a streamed model: from the last block back to the first, one in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hesse.curvature import CrossEntropy, Origin
from hesse.curvature.losses import next_tokens
from hesse.curvature.objective import label_generator
from hesse.errors import DataError, UnsupportedModelError
from hesse.estimation.parts import Part
from hesse.estimation.passage import Passage, Recorder
from hesse.models.network import Block, Layer, Network
from hesse.models.stream import Flow, finish


class BackwardWalk:
    """What each block's linear layers see of the true Fisher, blocks from the last to the first.

    `flows` have passed all blocks; `inputs[k]` are the hidden states that reached block k, one tensor a flow. The loss
    is the summed cross-entropy of labels sampled from the model, the same for the same `seed`; an encoder's is
    ½‖h - h₀‖² of its last hidden states, so a unit-variance Gaussian's nats. Memory: one block, its activations for
    one flow, and a hidden state and a gradient for each token, besides `inputs`.

    Iterating gives each block, loaded, with the passages of its flows, which are to be used up before the next. Sums
    over all of them, times `scale`, are nats per token: equal to those of an Objective on the whole model.
    `apart` refuses layers that mix the samples of a flow.
    """

    origin = Origin("sampled Fisher", "position", "nats per token")

    def __init__(
        self, network: Network, flows: list[Flow], inputs: list[list[Tensor]], seed: int, apart: bool = False
    ) -> None:
        self.network, self.flows, self.inputs, self.apart = network, flows, inputs, apart
        self._gradients: list[Tensor] = []
        terms, generator = 0, label_generator(seed)
        with network.surroundings() as model:
            for flow in flows:
                flow.hidden = flow.hidden.detach().requires_grad_()
                loss, count = self._sampled_loss(finish(network, model, flow), flow.ids, generator)
                (gradient,) = torch.autograd.grad(loss, flow.hidden)
                flow.hidden = flow.hidden.detach()
                self._gradients.append(gradient)
                terms += count
        if not terms:
            raise DataError("no sample has a token that predicts another: give samples of 2 tokens or more")
        self.scale = 1 / terms

    def __iter__(self) -> Iterator[tuple[Block, Iterator[Passage]]]:
        for index in reversed(range(len(self.network.blocks))):
            block = self.network.blocks[index]
            with self.network.loaded(block):
                passages = self._passages(block, index)
                yield block, passages
                for _ in passages:  # what was not looked at still carries the gradient back
                    pass

    def _passages(self, block: Block, index: int) -> Iterator[Passage]:
        modules = {layer.name: layer.module for layer in block.layers}
        copied: set[str] = set()  # layers whose outputs the block changes in place
        for number, (flow, hidden) in enumerate(zip(self.flows, self.inputs[index], strict=True)):
            flow.hidden = hidden.detach().requires_grad_()
            output, recorder = _recorded(flow, block, index, modules, copied)
            if recorder.changed:
                copied |= recorder.changed
                output, recorder = _recorded(flow, block, index, modules, copied)
            wanted = [flow.hidden, *recorder.outputs]
            back, *slopes = torch.autograd.grad(output, wanted, self._gradients[number], allow_unused=True)
            mixed = not recorder.leading(len(flow.ids), output.ndim)
            if mixed and self.apart and len(flow.ids) > 1:
                raise UnsupportedModelError(f"{block.name} mixes the samples of a batch: take one sample a batch")
            self._gradients[number], flow.hidden = back, flow.hidden.detach()
            yield Passage(recorder.rows(slopes, flat=mixed), len(flow.ids))

    def _sampled_loss(self, output: Tensor, ids: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int]:
        """The summed loss of labels drawn from the model itself, and the number of tokens it is summed over."""
        output = output.float()
        if not bool(torch.isfinite(output).all()):
            raise DataError(
                f"the output of {type(self.network.model).__name__} holds NaN or infinity: its last norm or its head "
                "overflows on this data"
            )
        if self.network.kind == "encoder":
            # Sample by sample, so that the same numbers come however samples are batched.
            noise = torch.stack([torch.randn(hidden.shape, generator=generator) for hidden in output])
            return (output * noise.to(output.device)).sum(), output.shape[0] * output.shape[1]
        loss = CrossEntropy()
        labels = loss.sampled_targets(output, next_tokens(ids), generator)
        return loss.terms(output, labels).sum(), loss.count(labels) or 0


def _recorded(
    flow: Flow, block: Block, index: int, modules: dict[str, nn.Module], copied: set[str]
) -> tuple[Tensor, Recorder]:
    with torch.enable_grad(), Recorder(modules, copied) as recorder:
        return flow.through(block.module, index), recorder


def layer_part(layer: Layer) -> Part:
    """A streamed layer's weight as a part."""
    return Part(f"{layer.name}.weight", "matrix", (layer.name,), isinstance(layer.module, Conv1D))
