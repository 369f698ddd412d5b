"""Any solution repaired: what it leaves is made good by a second constraint beside it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from hesse.constraints import Constraint, Plus, PlusCode
from hesse.curvature import Curvature
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver


class RepairState(NamedTuple):
    """The states of both solvers."""

    curvature: Curvature
    first: Any
    second: Any


@dataclass(frozen=True)
class Repair:
    """For A + B: `first` finds a member of A, `second` the member of B for what is left; then each again, in turn.

    With a Grid, a LowRank and WhitenedSVD one round is EoRA (Liu et al., 2024), the closed-form optimum of the
    correction; under an Identity LoRC (ZeroQuant-V2, Yao et al., 2023). More `rounds` go on as LQ-LoRA does (Guo et
    al., 2023), and the cheapest is kept.
    """

    first: Solver
    second: Solver
    rounds: int = 1

    def init(self, curvature: Curvature) -> RepairState:
        return RepairState(curvature, self.first.init(curvature), self.second.init(curvature))

    def compute(self, state: RepairState, weight: Tensor, constraint: Constraint) -> PlusCode:
        if not isinstance(constraint, Plus):
            raise UnsupportedProduct(f"Repair solves sums such as Grid + LowRank, not {type(constraint).__name__}")
        best: tuple[float, PlusCode] | None = None
        wanted = weight
        for _ in range(self.rounds):
            base = self.first.compute(state.first, wanted, constraint.base)
            left = weight - constraint.base.decode(base).to(weight.dtype)
            code = PlusCode(base, self.second.compute(state.second, left, constraint.correction))
            cost = state.curvature.quadratic(constraint.decode(code).to(weight.dtype) - weight)
            if best is None or cost < best[0]:
                best = cost, code
            wanted = weight - constraint.correction.decode(code.correction).to(weight.dtype)
        assert best is not None
        return best[1]
