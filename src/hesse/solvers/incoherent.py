"""QuIP: any solver in a basis where nothing stands out."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesse.constraints import Constraint, Rotated
from hesse.curvature import Curvature, Gram
from hesse.solvers.base import Solver, float32_bytes, require_constraint, require_gram
from hesse.solvers.error_feedback import ErrorFeedback


@dataclass(frozen=True)
class Incoherent(Solver):
    """`inner` on U W Vᵀ under V A Vᵀ, where ½ tr(d A dᵀ) is what it was.

    With ErrorFeedback this is QuIP's LDLQ in its incoherent basis (Chee et al., 2023). Choose it at 2 and 3 bits, where
    a few large weights would spend the codes.
    """

    inner: Solver = field(default_factory=ErrorFeedback)

    def init(self, curvature: Curvature) -> Gram:
        return require_gram(self, curvature)

    def compute(self, state: Gram, weight: Tensor, constraint: Constraint) -> Any:
        constraint = require_constraint(self, constraint, Rotated)
        moment = constraint.rotate_inputs(state.second_moment)
        turned = Gram(second_moment=(moment + moment.T) / 2, tokens=state.tokens, damping=state.damping)
        return self.inner.compute(self.inner.init(turned), constraint.rotate_weight(weight), constraint.base)

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        if not isinstance(constraint, Rotated):
            return super().workspace(shape, curvature, constraint, held)
        inner = self.inner.workspace(shape, curvature, constraint.base, held)
        return inner + float32_bytes(shape, weights=1, inputs=2)
