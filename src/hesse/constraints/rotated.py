"""S = members of another set in a rotated basis: U W Vᵀ on a grid, with U and V random and orthogonal."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, round_to
from hesse.constraints.grid import Grid


@dataclass(frozen=True, eq=True)
class Rotated(Constraint):
    """`base` on U W Vᵀ, a basis without outliers among weights and inputs (incoherence), as few codes need.

    U and V follow from `seed`, so they are not stored; inference must apply the same rotations, or use the decoded
    weight. Source: QuIP (Chee et al., 2023).
    """

    base: Constraint = field(default_factory=Grid)
    seed: int = 0

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> Any:
        # A diagonal metric is not diagonal in the other basis, so it is ignored.
        return self.base.encode(self.rotate_weight(weight))

    def decode(self, encoded: Any) -> Tensor:
        across = rotate_rows(self.base.decode(encoded), self.seed, back=True)
        return round_to(rotate_rows(across.T, self.seed + 1, back=True).T, self.dtype)

    def rotate_weight(self, weight: Tensor) -> Tensor:
        """Return U W Vᵀ."""
        return rotate_rows(rotate_rows(weight, self.seed).T, self.seed + 1).T

    def rotate_inputs(self, moment: Tensor) -> Tensor:
        """Return V A Vᵀ (in, in) for the second moment A of the inputs."""
        return rotate_rows(rotate_rows(moment, self.seed).T, self.seed).T

    def bits_per_weight(self, shape: torch.Size) -> float:
        return self.base.bits_per_weight(shape)


def rotate_rows(rows: Tensor, seed: int, back: bool = False) -> Tensor:
    """Return each row (..., n) in a random orthogonal basis of `seed`, or `back` from it.

    The basis is a random order, random signs and a Kronecker product of two random orthogonal matrices whose sizes are
    as close to each other as n allows: n (p + q) operations a row.
    """
    n = rows.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    p = next(size for size in range(int(n**0.5), 0, -1) if n % size == 0)
    order = torch.randperm(n, generator=generator)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    sides = [torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for size in (p, n // p)]
    left, right = (side.to(rows) for side in sides)
    order, signs = order.to(rows.device), signs.to(rows)
    if back:
        grid: Tensor = left.T @ rows.reshape(*rows.shape[:-1], p, n // p) @ right
        return (grid.reshape(rows.shape) * signs)[..., torch.argsort(order)]
    grid = left @ (rows[..., order] * signs).reshape(*rows.shape[:-1], p, n // p) @ right.T
    return grid.reshape(rows.shape)
