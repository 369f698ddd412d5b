"""What a compression did and what it cost: the content of `--json` and of the report file beside the weights."""

from dataclasses import asdict, dataclass
from typing import Any

from hesse.evaluation.measurements import Measurements
from hesse.layerwise.report import LayerReport


@dataclass(frozen=True)
class Verification:
    """What was found when the written checkpoint was read back."""

    tensors_equal: int
    samples: int
    held_out: bool  # whether calibration never saw these samples
    loss_name: str  # what measured and predicted are: KL of next tokens, or half squared error of hidden states
    measured: float
    standard_error: float | None
    predicted: float


@dataclass(frozen=True)
class CompressionReport:
    """The whole run. Sizes in bytes, times in seconds, losses in nats per token."""

    method: str
    model: str
    out: str
    format: str
    seconds: dict[str, float]  # total, and read, probe, calibrate, estimate, solve, predict, write, verify
    peak_rss_bytes: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float  # over the compressed layers, scales and zero points included
    bits_per_weight_model: float  # over all parameters of the model
    predicted_loss_increase: float
    verification: Verification
    calibration: dict[str, Any]
    fallbacks: list[str]
    layers: list[LayerReport]
    recipe: dict[str, Any]
    versions: dict[str, str]
    front: list[dict[str, Any]] | None = None  # of a planned run: kind, label, bytes and predicted of other choices
    measurements: Measurements | None = None  # made only when asked for

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)
