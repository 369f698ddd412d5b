"""H = diag(v): weights matter differently but do not interact (Optimal Brain Damage, Wanda)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.curvature.base import Curvature
from hesse.errors import ConditioningError
from hesse.finite import all_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagonal(Curvature):
    """A diagonal curvature with entries `values` (*shape), in the unit of whatever estimated them.

    Raises:
        ConditioningError: an entry is negative or not finite.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if not all_finite(self.values) or bool((self.values < 0).any()):
            raise ConditioningError("a Diagonal needs finite entries that are not negative")

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def matvec(self, vector: Tensor) -> Tensor:
        return vector * self.values

    def diagonal(self) -> Tensor:
        return self.values

    def solve(self, vector: Tensor) -> Tensor:
        return vector * self.inverse_diagonal()

    def inverse_diagonal(self) -> Tensor:
        damped = self.values + self.damping
        if bool((damped == 0).any()):
            raise ConditioningError("this Diagonal has zero entries and no damping; use .damped(0.01) first")
        return 1 / damped
