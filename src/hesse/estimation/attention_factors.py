"""What the output of a block's attention feels of the outputs of the linear layers inside it."""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hesse.errors import UnsupportedModelError
from hesse.networks.network import Block, Layer
from hesse.passes.stream import StreamBatch
from hesse.processes import Processes

SAMPLES = 32  # of the calibration, from its first on; each sees one probe
Draw = Callable[[Tensor], Iterable[Tensor]]  # probes for an output, of its shape


def attention_modules(block: Block) -> dict[nn.Module, list[Layer]]:
    """The attention of a block, by the name of its class, and the layers inside it; the outermost where one nests."""
    found: dict[nn.Module, list[Layer]] = {}
    taken: set[nn.Module] = set()
    for name, module in block.module.named_modules():
        if name and "Attention" in type(module).__name__ and module not in taken:
            inside = set(module.modules())
            layers = [layer for layer in block.layers if layer.module in inside]
            if layers:
                found[module] = layers
                taken |= inside
    return found


def layers_of_attention(block: Block) -> list[Layer]:
    """The layers inside the attention of a block."""
    return [layer for layers in attention_modules(block).values() for layer in layers]


def attention_factors(flows: list[StreamBatch], block: Block, index: int, processes: Processes) -> dict[str, Tensor]:
    """G (out, out) of the layers inside a block's attention, by name: ½ tr(G d E[xxᵀ] dᵀ) is what a change d costs.

    The cost is ½‖Δ‖² of the attention's output per position, to second order. With J from a layer's outputs to it, G is
    the mean over positions of (Jᵀv)(Jᵀv)ᵀ with probes v of random signs, whose products of two positions average out. J
    is of the block as it stands, on what the blocks before it now give. The seed is the block's number.

    Source: the aim of APTQ (Guan et al., 2024), as a Gauss-Newton matrix with one factor a side.

    Raises:
        UnsupportedModelError: the attention cannot be differentiated.
    """
    modules, layers = attention_modules(block), layers_of_attention(block)
    totals = {layer.name: layer.weight.new_zeros((layer.weight.shape[0],) * 2).float() for layer in layers}
    counts = dict.fromkeys(totals, 0)
    generator = torch.Generator().manual_seed(index)
    left = -(-SAMPLES // processes.world_size)

    def draw(output: Tensor) -> list[Tensor]:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return [signs.to(output)]

    for flow in flows:
        if left <= 0:
            break
        left -= len(flow.ids)
        for module, arguments, keywords in _calls(flow, block, index, modules):
            found = moments(partial(module, *arguments, **keywords), modules[module], draw)
            for name, (total, count) in found.items():
                totals[name] += total
                counts[name] += count
    for name, total in totals.items():
        processes.all_reduce(total)
        counts[name] = processes.all_reduce_sum(counts[name])
    return {name: total / counts[name] for name, total in totals.items() if counts[name]}


def moments(run: Callable[[], Any], layers: Collection[Layer], draw: Draw) -> dict[str, tuple[Tensor, int]]:
    """By layer, Σ (Jᵀv)(Jᵀv)ᵀ (out, out) over the positions of a run, its mean over the probes, and the positions.

    The layer whose output `run` returns has the identity, as often as there are positions.

    Raises:
        UnsupportedModelError: what it returns does not depend on the layers in a way that autograd sees.
    """
    outputs: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if output.requires_grad:
            outputs[name] = output
            return output
        outputs[name] = output.detach().requires_grad_()
        return outputs[name].clone()  # which may be changed in place

    hooks = [layer.module.register_forward_hook(partial(note, layer.name)) for layer in layers]
    try:
        with torch.enable_grad():
            result = run()
    finally:
        for hook in hooks:
            hook.remove()
    end: Tensor = result[0] if isinstance(result, tuple) else result
    if not end.requires_grad:
        raise UnsupportedModelError("the output of the attention does not depend on its layers in a differentiable way")
    before = {name: output for name, output in outputs.items() if output is not end}
    found: dict[str, tuple[Tensor, int]] = {}
    for name, output in outputs.items():
        wide = torch.promote_types(output.dtype, torch.float32)
        width, positions = output.shape[-1], output[..., 0].numel()
        whole = positions * torch.eye(width, dtype=wide, device=output.device)
        found[name] = (torch.zeros_like(whole) if name in before else whole, positions)
    probes = list(draw(end))
    for number, probe in enumerate(probes, 1):
        slopes = torch.autograd.grad(
            end, list(before.values()), probe, retain_graph=number < len(probes), allow_unused=True
        )
        for name, slope in zip(before, slopes, strict=True):
            if slope is not None:
                rows = slope.flatten(0, -2).to(found[name][0])
                found[name][0].addmm_(rows.T, rows, alpha=1 / len(probes))
    return found


def _calls(
    flow: StreamBatch, block: Block, index: int, modules: Collection[nn.Module]
) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """What each of `modules` is called with as a flow passes through the block."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((module, arguments, keywords))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            flow.through(block.module, index, flow.hidden.clone())  # which autograd may keep
    finally:
        for hook in hooks:
            hook.remove()
    return calls
