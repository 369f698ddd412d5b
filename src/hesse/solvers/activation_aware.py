"""AWQ: columns scaled up before they are rounded, the more the larger their inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, ScaledCode, ScaledColumns
from hesse.curvature import Curvature, Gram
from hesse.solvers.base import Solver, member_cost, require_constraint, require_gram


@dataclass(frozen=True)
class ActivationAware(Solver):
    """W ≈ Q(W diag(s)) diag(s)⁻¹ with s = E[x²]^(a/2), the exponent a searched for in [0, 1].

    A column that is scaled up is rounded more finely as long as it does not widen its group's range. The cost of each a
    is ½ tr(d A dᵀ) of the whole layer, from the Gram in place of a pass of data. a = 0 is plain rounding, so that the
    result is never worse. Source: AWQ (Lin et al., 2023), with the inputs' root mean square for their mean magnitude.
    """

    steps: int = 20

    def init(self, curvature: Curvature) -> Gram:
        return require_gram(self, curvature)

    def compute(self, state: Gram, weight: Tensor, constraint: Constraint) -> ScaledCode:
        constraint = require_constraint(self, constraint, ScaledColumns)
        size = state.diagonal().to(weight).sqrt()
        size = torch.where(size > 0, size, size[size > 0].min() if bool((size > 0).any()) else torch.ones_like(size))
        best: tuple[float, ScaledCode] | None = None
        for step in range(self.steps + 1):
            scale = size ** (step / self.steps)
            scale = scale / (scale.amax() * scale.amin()).sqrt()  # which keeps codes' scales in their type's range
            code = constraint.encode_scaled(weight, scale)
            cost = member_cost(state, constraint, code, weight)
            if best is None or cost < best[0]:
                best = cost, code
        assert best is not None
        return best[1]
