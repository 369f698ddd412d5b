"""The report of a repair."""

from dataclasses import dataclass

from hesse.result import LossChange, Report


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


@dataclass(frozen=True, kw_only=True)
class RepairReport(Report):
    """Low-rank factors added to a compressed model; `layers` are RepairedLayers, `method` is the curvature.

    `model` is the dense model, `bytes_before` are the compressed one's; losses are differences from the dense model,
    predicted by sums over layers.
    """

    compressed: str
    format: str  # adapter: factors beside the compressed model; dense: added to it
    rank: int
    bytes_before: int
    bytes_added: int  # by the factors; by a dense result less the compressed one's
    loss_before: LossChange
    loss: LossChange
