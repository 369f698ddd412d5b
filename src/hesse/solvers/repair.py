"""Any solution repaired: what it leaves is made good by a second constraint beside it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from hesse.constraints import Constraint, Plus, PlusCode
from hesse.curvature import Curvature
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver


class SumState(NamedTuple):
    """The states of both solvers."""

    curvature: Curvature
    first: Any
    second: Any


@dataclass(frozen=True)
class Repair:
    """For A + B: `first` finds a member of A, then `second` the member of B for what that leaves.

    With a Grid, a LowRank and WhitenedSVD this is EoRA (Liu et al., 2024), the closed-form optimum of the correction;
    under an Identity LoRC (ZeroQuant-V2, Yao et al., 2023).
    """

    first: Solver
    second: Solver

    def init(self, curvature: Curvature) -> SumState:
        return SumState(curvature, self.first.init(curvature), self.second.init(curvature))

    def compute(self, state: SumState, weight: Tensor, constraint: Constraint) -> PlusCode:
        constraint = as_sum(self, constraint)
        base = self.first.compute(state.first, weight, constraint.base)
        left = constraint.base.left(weight, base)
        return PlusCode(base, self.second.compute(state.second, left, constraint.correction))


def as_sum(solver: Solver, constraint: Constraint) -> Plus:
    """`constraint`, which must be a sum.

    Raises:
        UnsupportedProduct: it is not.
    """
    if not isinstance(constraint, Plus):
        raise UnsupportedProduct(
            f"{type(solver).__name__} solves sums such as Grid + LowRank, not {type(constraint).__name__}"
        )
    return constraint
