"""Both parts of a sum in turn: codes and a low rank, a sparse part and a low rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, Plus, PlusCode
from hesse.curvature import Curvature
from hesse.solvers.base import Solver, member_cost
from hesse.solvers.repair import Repair, SumState, as_sum, sum_workspace


@dataclass(frozen=True)
class Alternating(Solver):
    """For A + B: the member of B for the whole weight, then in turn `first` for what B leaves and `second` for what A.

    B comes first, so that A need not hold what a few directions make large; that is worth far more than the turns
    after it. The turns end after `rounds`, or where ½ dᵀHd rises, since solvers of grids and masks are no exact
    minimisers. The cheapest sum is kept, a Repair's among them: never worse than that. A round costs as much as one.

    Sources: LQ-LoRA (Guo et al., 2023) for a grid or table and a low rank with diagonals on both sides; OATS (Zhang and
    Papyan, 2024) for a sparse part and a low rank under the diagonal of a Gram.
    """

    first: Solver
    second: Solver
    rounds: int = 16

    def init(self, curvature: Curvature) -> SumState:
        return Repair(self.first, self.second).init(curvature)

    def compute(self, state: SumState, weight: Tensor, constraint: Constraint) -> PlusCode:
        constraint = as_sum(self, constraint)
        repaired = Repair(self.first, self.second).compute(state, weight, constraint)
        best = member_cost(state.curvature, constraint, repaired, weight), repaired
        last = float("inf")
        for code in self.turns(state, weight, constraint):
            cost = member_cost(state.curvature, constraint, code, weight)
            if cost >= last:
                break
            best, last = min(best, (cost, code), key=lambda priced: priced[0]), cost
        return best[1]

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        return sum_workspace(self.first, self.second, shape, curvature, constraint, held)

    def turns(self, state: SumState, weight: Tensor, constraint: Plus) -> Iterator[PlusCode]:
        """The sum after each round, for `weight` (out, in)."""
        base, correction = constraint.base, constraint.correction
        beside = self.second.compute(state.second, weight, correction)
        for _ in range(self.rounds):
            code = self.first.compute(state.first, correction.residual(weight, beside), base)
            beside = self.second.compute(state.second, base.residual(weight, code), correction)
            yield PlusCode(code, beside)
