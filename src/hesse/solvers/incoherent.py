"""QuIP: any solver in a random basis without outliers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesse.constraints import Constraint, Rotated
from hesse.curvature import Curvature, Gram
from hesse.solvers.base import Solver, float32_bytes, require_constraint
from hesse.solvers.error_feedback import ErrorFeedback


@dataclass(frozen=True)
class Incoherent(Solver):
    """Apply `inner` to the rotated weight U W Vᵀ under V A Vᵀ, which leaves ½ tr(d A dᵀ) unchanged.

    Use it at 2 and 3 bits, where a few large weights would waste codes, if inference can apply the same rotations.

    Equivalent to QuIP (Chee et al., 2023) with ErrorFeedback, which is its LDLQ.

    The curvature must be a Gram; the constraint a Rotated set that `inner` can solve.
    """

    curvatures = (Gram,)

    inner: Solver = field(default_factory=ErrorFeedback)

    def compute(self, state: Gram, weight: Tensor, constraint: Constraint) -> Any:
        constraint = require_constraint(self, constraint, Rotated)
        moment = constraint.rotate_inputs(state.second_moment)
        turned = Gram(second_moment=(moment + moment.T) / 2, tokens=state.tokens, damping=state.damping)
        return self.inner.compute(self.inner.init(turned), constraint.rotate_weight(weight), constraint.base)

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        base = require_constraint(self, constraint, Rotated).base
        return self.inner.workspace(shape, curvature, base, held) + float32_bytes(shape, weights=1, inputs=2)
