"""SliM-LLM: bits moved from the groups of columns that matter least to those that matter most."""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from hesse.constraints import Constraint, GridCode, MixedCode, MixedGrid
from hesse.curvature import Curvature, Gram
from hesse.solvers.base import Solver, float32_bytes, member_cost, require_constraint
from hesse.solvers.error_feedback import ErrorFeedback, FeedbackState


@dataclass(frozen=True)
class SalientBits(Solver):
    """Move bits from the groups of columns that matter least to those that matter most, then solve by `inner`.

    Use it at a mean of 2 to 4 bits; it costs `inner` once for every number of groups that is tried.

    Equivalent to SliM-LLM (Huang et al., 2024): columns are judged by Σ w² / U_jj² with (A + λI)⁻¹ = UᵀU, the cost of
    removing a weight after later ones have compensated. The number k of groups that change their bits is chosen by
    `inner`'s own ½ tr(d A dᵀ), k = 0 included, so uniform bits are never better; the search ends when `patience`
    successive k were no better. SliM-LLM chooses k by the divergence of plainly rounded outputs and starts at 1.

    The curvature must be a Gram, damped where it is singular; the constraint a MixedGrid.
    """

    curvatures = (Gram,)

    inner: ErrorFeedback = field(default_factory=ErrorFeedback)
    patience: int = 2

    def init(self, curvature: Curvature) -> FeedbackState:
        return self.inner.init(super().init(curvature))

    def compute(self, state: FeedbackState, weight: Tensor, constraint: Constraint) -> MixedCode:
        constraint = require_constraint(self, constraint, MixedGrid)
        best: tuple[float, MixedCode] | None = None
        since, pivots = 0, state.pivots[torch.argsort(state.columns)].to(weight)
        for grid in constraint.choices((weight / pivots).square().sum(0)):
            code = cast(GridCode, self.inner.compute(state, weight, grid))
            cost = member_cost(state.curvature, grid, code, weight)
            since += 1
            if best is None or cost < best[0]:
                best, since = (cost, constraint.code(code, grid)), 0
            if since > self.patience:
                break
        assert best is not None
        return best[1]

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        base = require_constraint(self, constraint, MixedGrid).base
        return self.inner.workspace(shape, curvature, base, held) + float32_bytes(shape, weights=1)
