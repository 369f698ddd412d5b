"""Measurements of a report: each layer alone, points along the change, used and held-out text, continuations."""

import math
from dataclasses import dataclass
from typing import ClassVar

Band = tuple[float, float]
# Range of measured over predicted cost in which predictions are reliable; docs/report.md gives the derivation.
BAND: Band = (0.5, 2.0)  # all layers together
LAYER_BAND: Band = (1 / 3, 3.0)  # one layer alone


@dataclass(frozen=True)
class MeasuredMean:
    """Mean over tokens, in nats per token (for encoders half the squared error of hidden states)."""

    value: float
    standard_error: float  # over tokens


class _PredictedMeasurement:
    """A measurement with its prediction, and the band that their ratio should lie in."""

    band: ClassVar[Band]
    predicted: float | None
    measured: MeasuredMean

    @property
    def ratio(self) -> float | None:
        """Return measured over predicted; None without a prediction, or with a prediction of 0."""
        return self.measured.value / self.predicted if self.predicted else None

    @property
    def outside(self) -> bool:
        """True if the ratio lies outside the band by more than two standard errors."""
        return outside_band(self.band, self.measured, self.predicted)


@dataclass(frozen=True)
class LayerMeasurement(_PredictedMeasurement):
    """Layers of one block, changed alone in the dense model: one layer, or one matrix of all experts of a mixture."""

    name: str
    layers: list[str]
    predicted: float | None  # the sum over the layers that have a prediction
    measured: MeasuredMean
    band = LAYER_BAND


@dataclass(frozen=True)
class LinePoint(_PredictedMeasurement):
    """All layers changed by `share` of their change: w + share · d."""

    share: float
    predicted: float  # share² times the whole prediction
    measured: MeasuredMean
    band = BAND


@dataclass(frozen=True)
class TextMeasurement:
    """The dense and the compressed model on some samples; fields that need a next token are None for encoders."""

    samples: int
    tokens: int
    divergence: MeasuredMean
    dense_loss: float | None
    compressed_loss: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Continuation:
    """Greedy continuations of the same tokens by both models."""

    prompt: str
    shared: str  # the common beginning
    dense: str  # the rest of the dense model's continuation
    compressed: str
    tokens: int
    shared_tokens: int  # length of the common beginning


@dataclass(frozen=True)
class Measurements:
    """All measurements of a report."""

    band: Band
    layer_band: Band
    layers: list[LayerMeasurement]
    line: list[LinePoint]  # in order of increasing share
    check: TextMeasurement  # on samples that calibration did not use, unless nothing was held out
    seen: TextMeasurement | None  # on as many samples that calibration used; None if none were held out or used
    continuations: list[Continuation]
    notes: list[str]  # measurements that are missing, with the reasons

    @property
    def whole(self) -> LinePoint:
        """Return the measurement of the whole change."""
        return next(point for point in self.line if point.share == 1)

    @property
    def holds_up_to(self) -> float | None:
        """Return the largest share of the change up to which the quadratic model holds; None if it never holds."""
        largest = None
        for point in self.line:
            if point.outside:
                break
            largest = point.share
        return largest


def outside_band(band: Band, measured: MeasuredMean, predicted: float | None) -> bool:
    """True if measured over predicted lies outside `band` by more than two standard errors of the measurement."""
    if predicted is None:
        return False
    if not math.isfinite(measured.value):
        return True
    low, high = (measured.value + sign * 2 * measured.standard_error for sign in (-1, 1))
    return low > band[1] * predicted or high < band[0] * predicted
