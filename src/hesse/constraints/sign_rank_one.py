"""S = signs times an outer product: one bit a weight, and a number for each row and each column."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, metric_or_ones, round_to

ROUNDS = 100  # of alternation at most
SETTLED = 1e-7  # relative change of a round below which it has converged


@dataclass(frozen=True, eq=False)
class SignRankOneCode:
    """weight[i, j] = ± rows[i] · columns[j]."""

    positive: Tensor  # (out, in) bool
    rows: Tensor  # (out,) and columns (in,), of the constraint's dtype held in float32
    columns: Tensor


@dataclass(frozen=True, eq=True)
class SignRankOne(Constraint):
    """sign(W) ⊙ (a bᵀ), with the a, b ≥ 0 of least Σ metric · (|W| - a bᵀ)²; the sign of 0 is +.

    Without a metric, or with one for rows times one for columns, that is the first singular pair of |W|, which has
    no negative entry (Perron and Frobenius), found by power iteration; with another metric, a local minimum found by
    alternating least squares. Source: OneBit (Xu et al., 2024, arXiv:2402.11295).
    """

    bytes_per_weight = 18  # four matrices of its size, and signs

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> SignRankOneCode:
        rows, columns = rank_one(weight.abs(), metric_or_ones(weight, metric))
        return SignRankOneCode(weight >= 0, round_to(rows, self.dtype), round_to(columns, self.dtype))

    def decode(self, encoded: SignRankOneCode) -> Tensor:
        size = round_to(torch.outer(encoded.rows, encoded.columns), self.dtype)
        return torch.where(encoded.positive, size, -size)

    def bits_per_weight(self, shape: torch.Size) -> float:
        return 1 + torch.finfo(self.dtype).bits * (shape[0] + shape[1]) / (shape[0] * shape[1])


def rank_one(size: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The a (out,) and b (in,), none negative, of least Σ metric (size - a bᵀ)² for `size` ≥ 0; ‖b‖² is b's length.

    Where the metric is zero over a row or column, its number is 0.
    """
    metric = metric.to(size)
    weighted = metric * size
    columns = torch.ones_like(size[0])
    rows = torch.zeros_like(size[:, 0])
    for _ in range(ROUNDS):
        before = columns
        rows = _ratio(weighted @ columns, metric @ columns.square())
        columns = _ratio(rows @ weighted, rows.square() @ metric)
        length = columns.square().mean().sqrt()
        if not length > 0:
            return rows, columns
        rows, columns = rows * length, columns / length
        if float((columns - before).square().mean()) <= SETTLED**2:
            break
    return _ratio(weighted @ columns, metric @ columns.square()), columns


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny), 0.0)
