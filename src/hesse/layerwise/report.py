"""Report of one compressed layer."""

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
    rank: int | None  # of a layer that is stored as two factors
    predicted_loss_increase: float | None
    relative_output_error: float | None  # E‖(W' - W)x‖² / E‖Wx‖²
    input_bits: int | None = None  # bits that a loader rounds the layer's inputs to
    predicted_input_loss: float | None = None  # of rounding inputs, in nats per token, apart from the weights'
