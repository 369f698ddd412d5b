"""H = diag(v) and H = I: weights that do not interact (Optimal Brain Damage, Wanda; magnitude pruning, rounding)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.curvature.base import Curvature
from hesse.errors import ConditioningError
from hesse.finite import all_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagonal(Curvature):
    """A diagonal curvature with entries `values` (*shape), in the unit of whatever estimated them.

    Example:
        >>> H = Diagonal(values=torch.tensor([1.0, 4.0]))
        >>> H @ torch.ones(2)
        tensor([1., 4.])
        >>> H.power(torch.ones(2), -0.5)
        tensor([1.0000, 0.5000])

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

    def _matvec(self, vector: Tensor) -> Tensor:
        return vector * self.values

    def diagonal(self) -> Tensor:
        return self.values

    def _solve(self, vector: Tensor) -> Tensor:
        return vector * self.inverse_diagonal()

    def _power(self, vector: Tensor, exponent: float) -> Tensor:
        return vector * (self._invertible() if exponent < 0 else self.values + self.damping) ** exponent

    def inverse_diagonal(self) -> Tensor:
        return 1 / self._invertible()

    def _invertible(self) -> Tensor:
        """Return the entries of H + λI, none of which is zero."""
        damped = self.values + self.damping
        if bool((damped == 0).any()):
            raise ConditioningError("this Diagonal has zero entries and no damping; use .damped(0.01) first")
        return damped


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
