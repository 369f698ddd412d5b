"""H = I: every weight matters the same (magnitude pruning, round to nearest)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.curvature.base import Curvature


@dataclass(frozen=True, kw_only=True, eq=False)
class Identity(Curvature):
    """The identity on single weights, so of every shape; `quadratic` is half the squared change, without a unit.

    Example:
        >>> Identity().quadratic(torch.tensor([3.0, 4.0]))
        12.5
    """

    @property
    def shape(self) -> torch.Size:
        return torch.Size(())

    def _matvec(self, vector: Tensor) -> Tensor:
        return vector

    def _power(self, vector: Tensor, exponent: float) -> Tensor:
        return vector * math.pow(1 + self.damping, exponent)

    def diagonal(self) -> Tensor:
        return torch.ones(())

    def _solve(self, vector: Tensor) -> Tensor:
        return vector / (1 + self.damping)

    def inverse_diagonal(self) -> Tensor:
        return torch.full((), 1 / (1 + self.damping))
