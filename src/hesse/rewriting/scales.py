"""Scales of inputs that the weights behind them take in, searched for as those that round best."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid
from hesse.networks.network import Network
from hesse.passes.stream import StreamBatch
from hesse.rewriting.checkpoint import Change
from hesse.rewriting.maps import Scaling
from hesse.rewriting.streams import Stream, Streams
from hesse.rewriting.walk import Inputs, walk

TRIED_TOKENS = 512  # on which candidates are compared
STEPS = 20


@dataclass(frozen=True)
class Target:
    """What a layer is to be rounded to."""

    constraint: Constraint | None  # None: it is left as it is
    input_bits: int | None


@dataclass(frozen=True, eq=False)
class Sizes:
    """How large each feature of a stream is: (heads, size), the largest over a head's repeats."""

    peak: Tensor  # max |x|
    square: Tensor  # E[x²]
    weight: Tensor  # max |w| over the readers' rows


def activation_aware(sizes: Sizes) -> Iterator[Tensor]:
    """E[x²]^(-a/2) for a from 0 to 1: large inputs are read by large weights, which round finely. Source: AWQ."""
    root = _positive(sizes.square.sqrt())
    for step in range(1, STEPS + 1):
        yield _centred(root ** -(step / STEPS))


def smoothing(sizes: Sizes) -> Iterator[Tensor]:
    """max|w|^(1-a) / max|x|^a for a from 0 to 1: what is hard to round moves to weights. Source: SmoothQuant."""
    peak, weight = _positive(sizes.peak), _positive(sizes.weight)
    for step in range(STEPS + 1):
        yield _centred(weight ** (1 - step / STEPS) / peak ** (step / STEPS))


def outlier_smoothing(sizes: Sizes) -> Iterator[Tensor]:
    """min(1, t / max|x|) for thresholds t between the median and the largest of max|x|: others stay. Source: QQQ."""
    peak = _positive(sizes.peak)
    largest, median = float(peak.max()), float(peak.median())
    for step in range(1, STEPS + 1):
        threshold = largest * (median / largest) ** (step / STEPS)
        yield (threshold / peak).clamp(max=1)


SCALINGS: dict[str, Callable[[Sizes], Iterator[Tensor]]] = {
    kind.__name__: kind for kind in (activation_aware, smoothing, outlier_smoothing)
}


def search_scales(
    kind: str,
    network: Network,
    streams: Streams,
    flows: list[StreamBatch],
    targets: Mapping[str, Target],
    step: Callable[[], None],
) -> list[Change]:
    """For each stream the scales t (heads, size) of its features with which its readers' outputs are nearest.

    Tried are those of `kind`, on 512 tokens, with weights as their `targets` round them to nearest, and inputs where
    these say so. A stream stays as it is where nothing is better, or no reader is rounded. Each is searched alone: a
    scale of a layer's outputs changes nothing in how its rows are rounded. `flows` are what reaches the first block of
    `network`; `step` after each block.
    """
    changes = []
    tokens = sum(flow.ids.numel() for flow in flows)
    for block, own, inputs in walk(network, streams, flows, every=-(-tokens // TRIED_TOKENS)):
        weights = {layer.name: layer.weight.float().cpu() for layer in block.layers}
        for stream in own.all:
            readers = {name: weights[name] for name in stream.layers if targets[name].constraint is not None}
            found = _best(kind, stream, inputs[stream.name], readers, targets) if readers else None
            if found is not None:
                changes.append(Change(stream, Scaling(found.double())))
        step()
    return changes


def _best(
    kind: str, stream: Stream, inputs: Inputs, readers: dict[str, Tensor], targets: Mapping[str, Target]
) -> Tensor | None:
    """The scales (heads, size) with the least error; None for ones."""

    def largest(values: Tensor) -> Tensor:
        return values.view(stream.heads, stream.repeats, -1).amax(1)

    peaks = torch.stack([weight.abs().amax(0) for weight in readers.values()]).amax(0)
    sizes = Sizes(largest(inputs.peak), largest(inputs.square), largest(peaks))
    best, least = None, _error(torch.ones_like(sizes.peak), stream.repeats, inputs.some, readers, targets)
    for scale in SCALINGS[kind](sizes):
        error = _error(scale, stream.repeats, inputs.some, readers, targets)
        if error < least:
            best, least = scale, error
    return best


def _error(
    scale: Tensor, repeats: int, inputs: Tensor, readers: dict[str, Tensor], targets: Mapping[str, Target]
) -> float:
    """Σ ‖Q(t x) Q(W / t)ᵀ - x Wᵀ‖² over tokens and readers."""
    wide = scale[:, None].expand(-1, repeats, -1).reshape(-1)
    total = 0.0
    for name, weight in readers.items():
        target = targets[name]
        assert target.constraint is not None
        given = inputs * wide
        if target.input_bits is not None:
            given = Grid(target.input_bits, -1).nearest(given)  # a token is a row, and has a scale of its own
        rounded = target.constraint.nearest(weight / wide)
        total += float((given @ rounded.T - inputs @ weight.T).double().square().sum())
    return total


def _positive(values: Tensor) -> Tensor:
    """`values` with the least that is above 0 for those that are not."""
    above = values[values > 0]
    return values.clamp(min=float(above.min())) if len(above) else torch.ones_like(values)


def _centred(scale: Tensor) -> Tensor:
    """`scale` times what keeps its largest and its smallest as far from 1 as each other."""
    return scale / (scale.amax() * scale.amin()).sqrt()
