"""The report of a compression."""

from dataclasses import dataclass
from typing import Any

from hesse.evaluation.measurements import Measurements
from hesse.result import LossChange, Report


@dataclass(frozen=True, kw_only=True)
class CompressionReport(Report):
    """A compressed checkpoint; `layers` are LayerReports."""

    method: str
    out: str
    bytes_before: int
    bytes_after: int
    loss: LossChange
    format: str
    peak_rss_bytes: int
    bits_per_weight: float  # over the compressed layers, scales and zero points included
    compressed_share: float  # of the linear weights, the output head left out
    bits_per_weight_model: float  # over all parameters of the model
    tensors_equal: int  # tensors that read back as they were solved or copied: all
    calibration: dict[str, Any]
    recipe: dict[str, Any]
    front: list[dict[str, Any]] | None = None  # of a budget: kind, label, bytes and predicted loss of other choices
    measurements: Measurements | None = None  # made only when asked for
