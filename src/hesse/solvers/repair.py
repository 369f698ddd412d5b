"""Repair a solution by a second constraint that is added to it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hesse.constraints import Constraint, Plus, PlusCode
from hesse.curvature import Curvature, Gram, Kronecker
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver, float32_bytes


class SumState(NamedTuple):
    """The states of both solvers."""

    curvature: Curvature
    first: Any
    second: Any


@dataclass(frozen=True)
class Repair(Solver):
    """Solve a sum A + B in two steps: `first` finds a member of A, `second` the member of B for what A leaves.

    Use it to repair a quantized or pruned weight by a small correction, at the cost of both solvers. Use Alternating
    where quality counts more than time.

    Equivalent to EoRA (Liu et al., 2024), the closed-form optimum of the correction, with a Grid, a LowRank and
    WhitenedSVD; to LoRC (ZeroQuant-V2; Yao et al., 2023) under an Identity.

    The curvature must be one that both solvers can use; the constraint a sum such as `Grid(4) + LowRank(16)`.
    """

    first: Solver
    second: Solver

    def init(self, curvature: Curvature) -> SumState:
        return SumState(curvature, self.first.init(curvature), self.second.init(curvature))

    def compute(self, state: SumState, weight: Tensor, constraint: Constraint) -> PlusCode:
        constraint = self._sum(constraint)
        base = self.first.compute(state.first, weight, constraint.base)
        left = constraint.base.residual(weight, base)
        return PlusCode(base, self.second.compute(state.second, left, constraint.correction))

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        """Return the bytes of the more demanding of both solvers, plus the other's state and the parts of a sum."""
        constraint = self._sum(constraint)
        parts = ((self.first, constraint.base), (self.second, constraint.correction))
        largest = max(solver.workspace(shape, curvature, part, held) for solver, part in parts)
        sides = float(issubclass(curvature, Gram | Kronecker)), float(issubclass(curvature, Kronecker))
        return largest + float32_bytes(shape, weights=2, inputs=sides[0], outputs=sides[1])

    def _sum(self, constraint: Constraint) -> Plus:
        """Return `constraint`, which must be a sum."""
        if not isinstance(constraint, Plus):
            raise UnsupportedProduct(
                f"{type(self).__name__} solves sums such as Grid + LowRank, not {type(constraint).__name__}"
            )
        return constraint
