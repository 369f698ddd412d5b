"""The best values of the weights that a mask keeps."""

from dataclasses import replace

import torch
from torch import Tensor

from hesse.curvature import BlockRankOneSum, Curvature, Gram, RankOneSum
from hesse.solvers.linear.conjugate_gradients import conjugate_steps, row_sums

OfGradients = BlockRankOneSum | RankOneSum


def refit_rows(weight: Tensor, start: Tensor, kept: Tensor, gram: Gram, steps: int) -> Tensor:
    """Lower ½ tr(d (A + λI) dᵀ), d = result - weight (out, in), over the values where `kept` is true; zeros elsewhere.

    `start` is zero where `kept` is not. Each row is a least-squares problem of its own with its own columns, and all
    rows take one step of conjugate gradients together: two matrix products for what no factorization could share. The
    problem is that of ADMM's weight update for pruning (Boža, 2024).
    """
    metric = gram.second_moment.to(weight.dtype) + gram.damping * torch.eye(weight.shape[1]).to(weight)
    residual = -((start - weight) @ metric) * kept
    return conjugate_steps(start, residual, metric.diagonal(), lambda v: (v @ metric) * kept, steps, row_sums)


def refit_whole(weight: Tensor, start: Tensor, kept: Tensor, curvature: Curvature, steps: int) -> Tensor:
    """Lower ½ dᵀHd, d = result - weight (out, in), over the values where `kept` is true; zeros elsewhere.

    `start` is zero where `kept` is not. One problem of all kept weights under any curvature with products, at one
    product a step. Where rows are independent, `refit_rows` gives each row its own step length.
    """
    residual = -curvature.matvec(start - weight) * kept
    diagonal = curvature.diagonal().to(weight.dtype)
    return conjugate_steps(start, residual, diagonal, lambda v: curvature.matvec(v) * kept, steps)


def kept_part(curvature: OfGradients, kept: Tensor) -> OfGradients:
    """Return the curvature restricted to the weights that are `kept` (*shape): the others neither move nor count."""
    if isinstance(curvature, RankOneSum):
        masked = RankOneSum.from_gradients(curvature.gradients * kept, curvature.origin)
        return replace(masked, damping=curvature.damping)
    inside = curvature.split(kept.to(curvature.matrices))
    matrices = inside[:, :, None] * curvature.matrices * inside[:, None, :] + torch.diag_embed(1 - inside)
    return replace(curvature, matrices=matrices)


def best_values(curvature: OfGradients, part: OfGradients, weight: Tensor, kept: Tensor) -> Tensor:
    """Return the values of the weights that are `kept`, zeros elsewhere, at which ½ dᵀ(H + λI)d is least: exact.

    `part` is the `kept_part` of the curvature. w_K + (H_KK + λI)⁻¹ H_KQ w_Q, with Q the removed weights; under
    gradients the second term lies in their span.
    """
    removed = torch.where(kept, 0, weight)
    if isinstance(part, RankOneSum) and isinstance(curvature, RankOneSum):
        moved = part.solve_in_span(curvature.along(removed) / len(part.gradients))
    else:
        moved = part.solve(torch.where(kept, curvature.matvec(removed), 0))
    return torch.where(kept, weight + moved.to(weight), 0)
