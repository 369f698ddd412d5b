"""What a repair did and what it brought: the content of `--json`, and of the report file beside the weights."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RepairedLayer:
    """One layer, before its low rank and with it; losses in nats per token (None where no token probed them)."""

    name: str
    shape: tuple[int, int]
    method: str  # curvature × constraint × solver
    tokens: int
    damping: float  # share of the Gram's mean eigenvalue
    predicted_before: float | None
    predicted_after: float | None
    output_error_before: float | None  # E‖(W' - W)x‖² / E‖Wx‖²
    output_error_after: float | None


@dataclass(frozen=True)
class RepairReport:
    """The whole run. Sizes in bytes, times in seconds, losses in nats per token, sums over layers where predicted."""

    dense: str
    compressed: str
    out: str
    format: str  # adapter: factors beside the compressed model; dense: added to it
    curvature: str
    rank: int
    bytes_compressed: int  # of the compressed model's weights
    bytes_added: int  # of the factors; those of a dense result less the compressed one's
    loss_name: str  # KL of next tokens, or half squared error of hidden states
    predicted_before: float
    predicted_after: float
    measured_before: float
    measured_after: float
    standard_error_before: float | None
    standard_error_after: float | None
    samples: int
    held_out: bool  # whether calibration never saw the samples that were measured on
    fallbacks: list[str]
    layers: list[RepairedLayer]
    seconds: dict[str, float]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)
