"""What a report measures: each layer alone, the way along the change, text seen and unseen, continuations."""

import math
from dataclasses import dataclass
from typing import ClassVar

Band = tuple[float, float]
# Measured over predicted cost, where predictions can be relied on; docs/report.md says what they were drawn from.
BAND: Band = (0.5, 2.0)  # all layers together
LAYER_BAND: Band = (1 / 3, 3.0)  # one layer alone


@dataclass(frozen=True)
class Measured:
    """A mean over tokens, in nats per token (for encoders half the squared error of hidden states)."""

    value: float
    standard_error: float  # over tokens


class _Compared:
    """What was measured beside its prediction, and the band that their ratio is to lie in."""

    band: ClassVar[Band]
    predicted: float | None
    measured: Measured

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None without a prediction."""
        return ratio(self.measured.value, self.predicted)

    @property
    def outside(self) -> bool:
        """Whether the ratio leaves the band by more than two standard errors."""
        return leaves(self.band, self.measured, self.predicted)


@dataclass(frozen=True)
class LayerMeasurement(_Compared):
    """Layers of one block, changed alone in the dense model: one layer, or one matrix of all experts of a mixture."""

    name: str
    layers: list[str]
    predicted: float | None  # the sum over those that have one
    measured: Measured
    band = LAYER_BAND


@dataclass(frozen=True)
class LinePoint(_Compared):
    """All layers changed by `share` of their change: w + share · d."""

    share: float
    predicted: float  # share² times the whole prediction
    measured: Measured
    band = BAND


@dataclass(frozen=True)
class TextMeasurement:
    """The dense and the compressed model on some samples; what needs a next token is None for encoders."""

    samples: int
    tokens: int
    divergence: Measured
    dense_loss: float | None
    compressed_loss: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Continuation:
    """What both models write after the same tokens, the likeliest token each time."""

    prompt: str
    shared: str  # what both write
    dense: str  # what comes after it
    compressed: str
    tokens: int
    shared_tokens: int  # how many are the same before they part


@dataclass(frozen=True)
class Measurements:
    """Everything that is measured for a report."""

    band: Band
    layer_band: Band
    layers: list[LayerMeasurement]
    line: list[LinePoint]  # by rising share
    check: TextMeasurement  # on samples that calibration did not see, unless nothing was held out
    seen: TextMeasurement | None  # on as many that calibration saw; None if nothing was held out, or calibrated
    continuations: list[Continuation]
    notes: list[str]  # what could not be measured, and why

    @property
    def whole(self) -> LinePoint:
        """The change that was made, all of it."""
        return next(point for point in self.line if point.share == 1)

    @property
    def holds_up_to(self) -> float | None:
        """The largest share of the change up to which the quadratic model holds; None where it never does."""
        held = None
        for point in self.line:
            if point.outside:
                break
            held = point.share
        return held


def ratio(measured: float, predicted: float | None) -> float | None:
    """Measured over predicted; None where nothing was predicted."""
    return measured / predicted if predicted else None


def leaves(band: Band, measured: Measured, predicted: float | None) -> bool:
    """Whether measured over predicted lies outside `band`, by more than two standard errors of what was measured."""
    if predicted is None:
        return False
    if not math.isfinite(measured.value):
        return True
    low, high = (measured.value + sign * 2 * measured.standard_error for sign in (-1, 1))
    return low > band[1] * predicted or high < band[0] * predicted
