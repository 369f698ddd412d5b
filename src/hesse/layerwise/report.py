"""The report of one compressed layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer; `predicted_loss_increase` is in nats per token (None without curvature for it)."""

    name: str
    shape: tuple[int, int]
    method: str  # curvature × constraint × solver
    tokens: int
    damping: float  # share of the Gram's mean eigenvalue
    bits_per_weight: float
    sparsity: float  # share of zeros
    rank: int | None  # where the layer is stored as two factors
    predicted_loss_increase: float | None
    relative_output_error: float | None  # E‖(W' - W)x‖² / E‖Wx‖²
    input_bits: int | None = None  # that a loader rounds its inputs to
    predicted_input_loss: float | None = None  # of that, in nats per token, beside that of the weights
