"""Solve a sum of two sets: repair a solution by a correction that is added to it, or alternate between both parts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hesse.constraints import Constraint, Plus, PlusCode
from hesse.curvature import Curvature, Gram, Kronecker
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver, float32_bytes, member_cost


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


@dataclass(frozen=True)
class Alternating(Repair):
    """Solve a sum A + B by turns: `second` finds B for what A leaves of the weight, `first` finds A for what B leaves.

    Use it where a Repair is not good enough and several times its cost are affordable: starting with B, so that A need
    not hold what a few directions make large, is worth far more than the rounds after it.

    Equivalent to LQ-LoRA (Guo et al., 2023) for a grid or table and a low rank with diagonals on both sides, and to
    OATS (Zhang and Papyan, 2024) for a sparse part and a low rank under the diagonal of a Gram. It ends after `rounds`,
    or where ½ dᵀHd rises, since solvers of grids and masks are no exact minimizers. The cheapest sum is kept, a
    Repair's among them: never worse than that.

    The curvature must be one that both solvers can use; the constraint a sum such as `Grid(4) + LowRank(16)`.
    """

    rounds: int = 16

    def compute(self, state: SumState, weight: Tensor, constraint: Constraint) -> PlusCode:
        constraint, repaired = self._sum(constraint), super().compute(state, weight, constraint)
        best = member_cost(state.curvature, constraint, repaired, weight), repaired
        last = float("inf")
        for code in self.turns(state, weight, constraint):
            cost = member_cost(state.curvature, constraint, code, weight)
            if cost >= last:
                break
            best, last = min(best, (cost, code), key=lambda priced: priced[0]), cost
        return best[1]

    def turns(self, state: SumState, weight: Tensor, constraint: Plus) -> Iterator[PlusCode]:
        """Yield the sum after each round, for `weight` (out, in)."""
        base, correction = constraint.base, constraint.correction
        beside = self.second.compute(state.second, weight, correction)
        for _ in range(self.rounds):
            code = self.first.compute(state.first, correction.residual(weight, beside), base)
            beside = self.second.compute(state.second, base.residual(weight, code), correction)
            yield PlusCode(code, beside)
