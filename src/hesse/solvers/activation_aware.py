"""AWQ: scale columns up before rounding, the more the larger their inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, ScaledCode, ScaledColumns
from hesse.curvature import Gram
from hesse.solvers.base import Solver, member_cost, require_constraint


@dataclass(frozen=True)
class ActivationAware(Solver):
    """Scale columns up before rounding, the more the larger their inputs: W ≈ Q(W diag(s)) diag(s)⁻¹.

    Use it where the inverse scales can be folded into the layer before, and error feedback is not wanted.

    Equivalent to AWQ (Lin et al., 2023), with the inputs' root mean square for their mean magnitude and the Gram in
    place of a pass of data: s = E[x²]^(a/2), with the exponent a in [0, 1] searched in `steps` by the cost
    ½ tr(d A dᵀ) of the whole layer. A column that is scaled up is rounded more finely as long as it does not widen its
    group's range. a = 0 is plain rounding, so the result is never worse.

    The curvature must be a Gram; the constraint a ScaledColumns.
    """

    curvatures = (Gram,)

    steps: int = 20

    def compute(self, state: Gram, weight: Tensor, constraint: Constraint) -> ScaledCode:
        constraint = require_constraint(self, constraint, ScaledColumns)
        size = state.diagonal().to(weight).sqrt()
        size = torch.where(size > 0, size, size[size > 0].min() if bool((size > 0).any()) else torch.ones_like(size))
        scales = (size ** (step / self.steps) for step in range(self.steps + 1))
        # Divided so that the grid's scales stay in the range of their type.
        codes = (constraint.encode_scaled(weight, s / (s.amax() * s.amin()).sqrt()) for s in scales)
        return min(codes, key=lambda code: member_cost(state, constraint, code, weight))
