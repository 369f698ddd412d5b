"""AdaDim: groups along a layer's inputs or along its outputs, whichever costs less."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, EitherSide, SideCode
from hesse.curvature import Curvature
from hesse.solvers.base import InnerState, Solver, float32_bytes, member_cost, require_constraint


@dataclass(frozen=True)
class CheaperSide(Solver):
    """Solve with groups along the inputs and along the outputs, and keep the side with less ½ dᵀHd.

    Use it for narrow groups where some inputs or some outputs have outliers; it costs `inner` twice.

    Equivalent to AdaDim (Heo et al., 2023), for plain rounding (without `inner`) and for GPTQ. Never worse than `inner`
    with groups along rows.

    The curvature must be one that `inner` can use; the constraint an EitherSide.
    """

    inner: Solver | None = None

    def init(self, curvature: Curvature) -> InnerState:
        return InnerState(curvature, None if self.inner is None else self.inner.init(curvature))

    def compute(self, state: InnerState, weight: Tensor, constraint: Constraint) -> SideCode:
        constraint = require_constraint(self, constraint, EitherSide)
        found = []
        for along in (False, True):
            side = constraint.side(along)
            code = side.encode(weight) if self.inner is None else self.inner.compute(state.inner, weight, side)
            found.append(SideCode(code, along))
        return min(found, key=lambda code: member_cost(state.curvature, constraint, code, weight))

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        if self.inner is None or not isinstance(constraint, EitherSide):
            return super().workspace(shape, curvature, constraint, held) + float32_bytes(shape, weights=2.5)
        sides = (self.inner.workspace(shape, curvature, constraint.side(along), held) for along in (False, True))
        return max(sides) + float32_bytes(shape, weights=2)
