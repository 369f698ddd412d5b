"""Scales of layer inputs that adjacent weights absorb, searched so that the layers round best."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid
from hesse.networks.network import Network
from hesse.passes.stream import StreamBatch
from hesse.rewriting.checkpoint import StreamChange
from hesse.rewriting.maps import Scaling
from hesse.rewriting.stream_inputs import StreamInputs, stream_inputs
from hesse.rewriting.streams import Stream, Streams

TRIED_TOKENS = 512  # tokens on which candidates are compared
STEPS = 20


@dataclass(frozen=True)
class RoundingTarget:
    """Later rounding of a layer."""

    constraint: Constraint | None  # None: unchanged
    input_bits: int | None


@dataclass(frozen=True, eq=False)
class FeatureSizes:
    """Sizes of a stream's features: each (heads, size), the largest over a head's repeats."""

    peak: Tensor  # max |x|
    square: Tensor  # E[x²]
    weight: Tensor  # max |w| over the readers' rows


def activation_aware(sizes: FeatureSizes) -> Iterator[Tensor]:
    """Yield E[x²]^(-a/2) for a from 0 to 1: large inputs meet larger weights. Source: AWQ."""
    root = _positive(sizes.square.sqrt())
    for step in range(1, STEPS + 1):
        yield _centred(root ** -(step / STEPS))


def smoothing(sizes: FeatureSizes) -> Iterator[Tensor]:
    """Yield max|w|^(1-a) / max|x|^a for a from 0 to 1: outliers move from inputs to weights. Source: SmoothQuant."""
    peak, weight = _positive(sizes.peak), _positive(sizes.weight)
    for step in range(STEPS + 1):
        yield _centred(weight ** (1 - step / STEPS) / peak ** (step / STEPS))


def outlier_smoothing(sizes: FeatureSizes) -> Iterator[Tensor]:
    """Yield min(1, t / max|x|) for thresholds t from the largest of max|x| down to its median. Source: QQQ."""
    peak = _positive(sizes.peak)
    largest, median = float(peak.max()), float(peak.median())
    for step in range(1, STEPS + 1):
        threshold = largest * (median / largest) ** (step / STEPS)
        yield (threshold / peak).clamp(max=1)


SCALINGS: dict[str, Callable[[FeatureSizes], Iterator[Tensor]]] = {
    kind.__name__: kind for kind in (activation_aware, smoothing, outlier_smoothing)
}


def search_scales(
    kind: str,
    network: Network,
    streams: Streams,
    flows: list[StreamBatch],
    targets: Mapping[str, RoundingTarget],
    step: Callable[[], None],
) -> list[StreamChange]:
    """Search for each stream the scales t (heads, size) that minimise the rounding error of its readers' outputs.

    The candidates of `kind` are compared on 512 tokens, with weights and, where a target has them, inputs rounded to
    nearest by `targets`. A stream is unchanged if no candidate is better or no reader is rounded. Streams are searched
    independently, because a scale of a layer's outputs does not affect the rounding of its rows. `flows` are the inputs
    of the first block of `network`; `step` is called after each block.
    """
    changes = []
    tokens = sum(flow.ids.numel() for flow in flows)
    for block, block_streams, inputs in stream_inputs(network, streams, flows, every=-(-tokens // TRIED_TOKENS)):
        weights = {layer.name: layer.weight.float().cpu() for layer in block.layers}
        for stream in block_streams.all:
            readers = {name: weights[name] for name in stream.layers if targets[name].constraint is not None}
            scale = _best(kind, stream, inputs[stream.name], readers, targets) if readers else None
            if scale is not None:
                changes.append(StreamChange(stream, Scaling(scale.double())))
        step()
    return changes


def _best(
    kind: str, stream: Stream, inputs: StreamInputs, readers: dict[str, Tensor], targets: Mapping[str, RoundingTarget]
) -> Tensor | None:
    """Return the scales (heads, size) with the least error; None if that is without scales."""

    def largest(values: Tensor) -> Tensor:
        return values.view(stream.heads, stream.repeats, -1).amax(1)

    peaks = torch.stack([weight.abs().amax(0) for weight in readers.values()]).amax(0)
    sizes = FeatureSizes(largest(inputs.peak), largest(inputs.square), largest(peaks))
    best, least = None, _error(torch.ones_like(sizes.peak), stream.repeats, inputs.sampled, readers, targets)
    for scale in SCALINGS[kind](sizes):
        error = _error(scale, stream.repeats, inputs.sampled, readers, targets)
        if error < least:
            best, least = scale, error
    return best


def _error(
    scale: Tensor, repeats: int, inputs: Tensor, readers: dict[str, Tensor], targets: Mapping[str, RoundingTarget]
) -> float:
    """Return Σ ‖Q(t x) Q(W / t)ᵀ - x Wᵀ‖² over tokens and readers."""
    wide = scale[:, None].expand(-1, repeats, -1).reshape(-1)
    total = 0.0
    for name, weight in readers.items():
        target = targets[name]
        assert target.constraint is not None
        layer_inputs = inputs * wide
        if target.input_bits is not None:
            layer_inputs = Grid(target.input_bits, -1).nearest(layer_inputs)  # one scale per token
        rounded = target.constraint.nearest(weight / wide)
        total += float((layer_inputs @ rounded.T - inputs @ weight.T).double().square().sum())
    return total


def _positive(values: Tensor) -> Tensor:
    """Return `values` with the smallest positive value in place of those that are not positive."""
    above = values[values > 0]
    return values.clamp(min=float(above.min())) if len(above) else torch.ones_like(values)


def _centred(scale: Tensor) -> Tensor:
    """Return `scale` divided by the geometric mean of its largest and smallest entry."""
    return scale / (scale.amax() * scale.amin()).sqrt()
