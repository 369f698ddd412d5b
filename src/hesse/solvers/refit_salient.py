"""PTQ1.61's fit: refit the scales of rows and columns for fixed codes and signs, under the Gram of the inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, GridCode, SalientCode, SalientColumns, SignRankOneCode
from hesse.constraints.base import round_to
from hesse.constraints.grouped import Scales
from hesse.curvature import Curvature, Gram
from hesse.solvers.base import Solver, float32_bytes, member_cost, require_constraint


@dataclass(frozen=True)
class RefitSalient(Solver):
    """Refit the scales of SalientColumns by least squares under the whole Gram, with codes and signs as encoded.

    Use it below two bits a weight, for every SalientColumns with a Gram.

    Equivalent to PTQ1.61's fit (Zhao et al., 2025, arXiv:2502.13179), in closed form. Alternately, `rounds` times, each
    exact given the other: the columns' numbers b of all rows together, one system of (in - salient) unknowns, and for
    each row its number a and a factor on its grid's scales, two unknowns. A round takes about out · in² + in³
    operations; the cheapest is kept, so none raises ½ tr(d A dᵀ).

    The curvature must be a Gram; the constraint a SalientColumns, whose grid is symmetric.
    """

    curvatures = (Gram,)

    rounds: int = 4

    def compute(self, state: Gram, weight: Tensor, constraint: Constraint) -> SalientCode:
        constraint = require_constraint(self, constraint, SalientColumns)
        best = constraint.encode(weight, state.diagonal().to(weight))
        least = member_cost(state, constraint, best, weight)
        code = best
        for _ in range(self.rounds):
            code = _refit_rows(state, weight, constraint, _refit_columns(state, weight, constraint, code))
            cost = member_cost(state, constraint, code, weight)
            if cost < least:
                best, least = code, cost
        return best

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        return float32_bytes(shape, weights=5.5, inputs=2)


def _refit_columns(gram: Gram, weight: Tensor, constraint: SalientColumns, code: SalientCode) -> SalientCode:
    """Return `code` with the b of least cost: (A ⊙ Sᵀ diag(a²) S) b = Σ a_i s_i ⊙ (A r_i), r = weight - grid."""
    others = ~code.salient
    moment = gram.second_moment.to(weight)
    left = weight.clone()
    left[:, code.salient] -= constraint.grid.decode(code.grid).to(weight)
    signs = torch.where(code.rest.positive, 1.0, -1.0).to(weight) * code.rest.rows.to(weight)[:, None]
    system = moment[others][:, others] * (signs.T @ signs)
    wanted = (signs * (left @ moment[:, others])).sum(0)
    system.diagonal().add_(system.diagonal().mean() * 1e-6)
    columns, failed = torch.linalg.solve_ex(system, wanted)
    if int(failed) or not bool(columns.isfinite().all()):
        return code
    rest = SignRankOneCode(code.rest.positive, code.rest.rows, round_to(columns, constraint.dtype))
    return SalientCode(code.salient, code.grid, rest)


def _refit_rows(gram: Gram, weight: Tensor, constraint: SalientColumns, code: SalientCode) -> SalientCode:
    """Return `code` with the a, and the factor on the grid's scales, of least cost in each row."""
    parts = torch.zeros(2, *weight.shape).to(weight)
    parts[0][:, code.salient] = constraint.grid.decode(code.grid).to(weight)
    signs = torch.where(code.rest.positive, 1.0, -1.0).to(weight)
    parts[1][:, ~code.salient] = signs * code.rest.columns.to(weight)
    images = parts @ gram.second_moment.to(weight)
    system = torch.einsum("kij,lij->ikl", parts, images)
    wanted = torch.einsum("kij,ij->ik", images, weight)
    ridge = system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(weight.dtype).tiny) * 1e-6
    found = torch.linalg.solve(system + ridge[:, None, None] * torch.eye(2).to(weight), wanted)
    factor, rows = found.unbind(1)
    scale = constraint.grid.stored_scale(code.grid.scales.scale * factor[:, None].to(code.grid.scales.scale))
    rest = SignRankOneCode(code.rest.positive, round_to(rows, constraint.dtype), code.rest.columns)
    return SalientCode(code.salient, GridCode(code.grid.codes, Scales(scale, None)), rest)
