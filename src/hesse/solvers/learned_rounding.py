"""AdaRound: learn which way each weight is rounded, by gradient descent on the whole layer's cost."""

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid, GridCode
from hesse.curvature import Curvature, Gram, Kronecker
from hesse.solvers.base import InnerState, Solver, float32_bytes, member_cost, require_constraint
from hesse.solvers.error_feedback import ErrorFeedback
from hesse.solvers.never_worse import cheaper_rows
from hesse.solvers.sweeps.row_flips import settle_rows
from hesse.solvers.two_sided_feedback import TwoSidedFeedback

LOW, HIGH = -0.1, 1.1  # range that a sigmoid is stretched to before it is cut to [0, 1]
SHARPEST, BLUNTEST = 2.0, 20.0  # exponents of the regulariser, which falls from the second to the first
FREE = 0.2  # share of the steps without the regulariser


@dataclass(frozen=True)
class LearnedRounding(Solver):
    """Learn which way each weight is rounded, by gradient descent on the cost of the whole layer.

    Use it where time does not matter: it improves `start` by hundreds of products with H.

    Equivalent to AdaRound (Nagel et al., 2020) on the second moments of all inputs in place of batches, and under a
    curvature of the loss to BRECQ (Li et al., 2021). Codes are c + h · u around the codes c of `start`, not around
    floor(w / s), which costs less on correlated inputs; u is one step down the slope H d, and h in [0, 1] a stretched
    sigmoid cut at both ends. All h of a layer take `steps` steps of Adam on ½ dᵀHd and a term that drives each h to an
    end, with the exact gradient: one product with H each. Before and after, codes are changed one at a time until no
    change lowers the cost; the cheaper of both is kept, row by row under a Gram. So never worse than `start`.

    The curvature must be a Gram, or a Kronecker if `start` is a TwoSidedFeedback; the constraint a Grid.
    """

    curvatures = (Gram, Kronecker)

    start: ErrorFeedback | TwoSidedFeedback = field(default_factory=ErrorFeedback)
    steps: int = 300
    rate: float = 0.02
    first_share: float = 0.3  # h before the first step

    def init(self, curvature: Curvature) -> InnerState:
        return InnerState(super().init(curvature), self.start.init(curvature))

    def compute(self, state: InnerState, weight: Tensor, constraint: Constraint) -> GridCode:
        constraint = require_constraint(self, constraint, Grid)
        start = cast(GridCode, self.start.compute(state.inner, weight, constraint))
        settled = self._settle_codes(state, weight, constraint, start)
        found = self.learn(state.curvature, weight, constraint, settled)
        learned = self._settle_codes(state, weight, constraint, found)
        if isinstance(state.curvature, Gram):
            return cheaper_rows(state.curvature, constraint, weight, learned, settled)
        return min((settled, learned), key=lambda code: member_cost(state.curvature, constraint, code, weight))

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        start = self.start.workspace(shape, curvature, constraint, held)
        if issubclass(curvature, Kronecker):
            return max(start, float32_bytes(shape, weights=20, inputs=2, outputs=2))
        return max(start, float32_bytes(shape, weights=22, inputs=2))

    def _settle_codes(self, state: InnerState, weight: Tensor, grid: Grid, code: GridCode) -> GridCode:
        if isinstance(state.curvature, Gram):
            return settle_rows(code, state.curvature, grid, weight)
        return cast(TwoSidedFeedback, self.start).settle(state.inner, weight, grid, code)

    def learn(self, curvature: Curvature, weight: Tensor, grid: Grid, start: GridCode) -> GridCode:
        """Return the codes that descent from `start` reaches, with the same scales."""
        step = grid.expand(start.scales.scale, weight.shape[1]).to(weight)
        codes, member = start.codes.to(weight), grid.steps(start, weight) * step
        downhill = torch.where(curvature.matvec(member - weight) * step < 0, 1.0, -1.0)
        other = (codes + downhill).clamp(grid.lowest, grid.highest)
        direction = (other - codes) * step
        share = torch.full_like(weight, (self.first_share - LOW) / (HIGH - LOW))
        logits = torch.logit(share)
        level = step.square() * (curvature.trace() / curvature.shape.numel())
        moments = torch.zeros_like(logits), torch.zeros_like(logits)
        for number in range(self.steps):
            sigmoid = torch.sigmoid(logits)
            stretched = sigmoid * (HIGH - LOW) + LOW
            share = stretched.clamp(0, 1)
            slope = curvature.matvec(member + share * direction - weight) * direction / level
            done = (number / self.steps - FREE) / (1 - FREE)
            if done > 0:
                exponent = SHARPEST + (BLUNTEST - SHARPEST) * (1 + math.cos(math.pi * done)) / 2
                side = 2 * share - 1
                slope -= 2 * exponent * side.sign() * side.abs() ** (exponent - 1)
            inside = (stretched > 0) & (stretched < 1)
            _adam(logits, slope * sigmoid * (1 - sigmoid) * inside, moments, self.rate, number + 1)
        return GridCode(torch.where(logits > 0, other, codes).to(torch.int8), start.scales)


def _adam(values: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rate: float, number: int) -> None:
    """Take step `number`, counted from 1, of Adam (Kingma and Ba, 2015), in place."""
    first, second = moments
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient.square(), 0.001)
    values -= rate * (first / (1 - 0.9**number)) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
