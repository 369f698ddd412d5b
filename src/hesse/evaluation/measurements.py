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
    def outside_band(band: Band, measured: MeasuredMean, predicted: float | None) -> bool:
    """True if measured over predicted lies outside `band` by more than two standard errors of the measurement."""
    if predicted is None:
        return False
    if not math.isfinite(measured.value):
        return True
    low, high = (measured.value + sign * 2 * measured.standard_error for sign in (-1, 1))
    return low > band[1] * predicted or high < band[0] * predicted
