"""Alternate between both parts of a sum: codes and a low rank, a sparse part and a low rank."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hesse.constraints import Constraint, Plus, PlusCode
from hesse.solvers.base import member_cost
from hesse.solvers.repair import Repair, SumState


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
