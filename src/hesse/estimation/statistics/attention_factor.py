"""Output factors of the layers inside a block's attention, for an error of the attention's output."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hesse.errors import UnsupportedModelError
from hesse.estimation.statistics.base import STATISTICS, BlockStatistic
from hesse.networks.attention import tells_attention
from hesse.networks.network import Block, Layer, Network
from hesse.passes.stream import StreamBatch
from hesse.processes import Processes

SAMPLES = 32  # the first of the calibration samples; each gets one probe
Draw = Callable[[Tensor], Iterable[Tensor]]  # probes for an output, of its shape


class AttentionFactor(BlockStatistic):
    """G (out, out) of each layer inside a block's attention: ½ tr(G d E[xxᵀ] dᵀ) is ½‖Δ‖² of the attention's output.

    None for layers outside.
    """

    name = "attention factor"

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return 4 bytes for each pair of outputs."""
        return 4 * shape[0] ** 2

    def check_network(self, network: Network, layers: Collection[str]) -> None:
        """Refuse a network whose attention has none of the layers, or cannot be differentiated."""
        inside = {layer.name for block in network.blocks for layer in layers_of_attention(block)}
        if not (tells_attention(network.model) and inside.intersection(layers)):
            raise UnsupportedModelError(
                f"{type(network.model).__name__} has no attention with layers of this method's that can be passed back "
                "through: use curvature gram or kronecker, or another method"
            )

    def values(
        self, batches: Sequence[StreamBatch], block: Block, index: int, processes: Processes
    ) -> Mapping[str, Tensor]:
        """Return the factors from a pass over the block as it stands."""
        return attention_factors(batches, block, index, processes)


def attention_modules(block: Block) -> dict[nn.Module, list[Layer]]:
    """Return a block's attention modules, known by their class names, and the layers inside each; outermost only."""
    attentions: dict[nn.Module, list[Layer]] = {}
    covered: set[nn.Module] = set()
    for name, module in block.module.named_modules():
        if name and "Attention" in type(module).__name__ and module not in covered:
            inside = set(module.modules())
            layers = [layer for layer in block.layers if layer.module in inside]
            if layers:
                attentions[module] = layers
                covered |= inside
    return attentions


def layers_of_attention(block: Block) -> list[Layer]:
    """Return the layers inside the attention of a block."""
    return [layer for layers in attention_modules(block).values() for layer in layers]


def attention_factors(
    batches: Sequence[StreamBatch], block: Block, index: int, processes: Processes
) -> dict[str, Tensor]:
    """Return G (out, out) by the names of the layers inside a block's attention: a change d costs ½ tr(G d E[xxᵀ] dᵀ).

    The cost is ½‖Δ‖² of the attention's output per position, to second order. With the Jacobian J from a layer's
    outputs to the attention's output, G is the mean over positions of (Jᵀv)(Jᵀv)ᵀ with probes v of random signs, so
    that products of two positions average out. J is of the block as it stands, at the batches' hidden states. The seed
    is the block's number.

    Source: the aim of APTQ (Guan et al., 2024), as a Gauss-Newton matrix with one factor a side.

    Raises:
        UnsupportedModelError: the attention cannot be differentiated.
    """
    modules, layers = attention_modules(block), layers_of_attention(block)
    totals = {layer.name: layer.weight.new_zeros((layer.weight.shape[0],) * 2).float() for layer in layers}
    counts = dict.fromkeys(totals, 0)
    generator = torch.Generator().manual_seed(index)
    remaining = -(-SAMPLES // processes.world_size)

    def draw(output: Tensor) -> list[Tensor]:
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return [signs.to(output)]

    for batch in batches:
        if remaining <= 0:
            break
        remaining -= len(batch.ids)
        for module, arguments, keywords in _calls(batch, block, index, modules):
            sums = moments(partial(module, *arguments, **keywords), modules[module], draw)
            for name, (total, count) in sums.items():
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

    with ExitStack() as hooks, torch.enable_grad():
        for layer in layers:
            hooks.enter_context(layer.module.register_forward_hook(partial(note, layer.name)))
        result = run()
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
    batch: StreamBatch, block: Block, index: int, modules: Collection[nn.Module]
) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments that each of `modules` is called with as a batch passes through the block."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((module, arguments, keywords))

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        batch.run(block.module, index, batch.hidden.clone())  # which autograd may keep
    return calls


STATISTICS.register(AttentionFactor.name, AttentionFactor())
