"""The best values for what is chosen: of the weights that a mask keeps, a grid's scales, a codebook's values."""

from dataclasses import replace

import torch
from torch import Tensor

from hesse.constraints import CodebookCode, Grid, GridCode
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


def refit_scales(code: GridCode, slope: Tensor, curvature: Curvature, grid: Grid, steps: int) -> Tensor:
    """Scales (out, groups) that lower ½ dᵀHd, d = codes · scales - weight, from those of `code` on; not rounded.

    `slope` (out, in) is H d for the scales of `code`. A least-squares problem, on which conjugate gradients,
    preconditioned by the diagonal of H over the codes, take `steps` steps: one product with H each. No step raises the
    cost, beyond rounding. A group whose codes are all zero keeps its scale.
    """
    codes = grid.steps(code, slope)

    def product(scale: Tensor) -> Tensor:
        return grid.by_group(codes * curvature.matvec(codes * grid.expand(scale, codes.shape[1]))).sum(-1)

    scale = code.scales.scale.to(slope.dtype)
    metric = grid.by_group(codes.square() * curvature.diagonal().to(slope.dtype)).sum(-1)
    residual = torch.where(metric > 0, -grid.by_group(codes * slope).sum(-1), 0)
    return conjugate_steps(scale, residual, metric, product, steps)


def refit_values(code: CodebookCode, slope: Tensor, curvature: Curvature, steps: int) -> Tensor:
    """Values (out, k) that lower ½ dᵀHd, d = values[codes] - weight, from those of `code` on; not rounded or sorted.

    `slope` (out, in) is H d for the values of `code`. Least squares, as in `refit_scales`. A value that no code takes
    stays.
    """
    codes = code.codes.long()
    values = code.values.to(slope.dtype)

    def sums(matrix: Tensor) -> Tensor:
        """Over the weights of a row that have one value."""
        return torch.zeros_like(values).scatter_add(1, codes, matrix)

    def product(change: Tensor) -> Tensor:
        return sums(curvature.matvec(change.gather(1, codes)))

    metric = sums(curvature.diagonal().to(slope.dtype).expand_as(slope))
    return conjugate_steps(values, torch.where(metric > 0, -sums(slope), 0), metric, product, steps)


def in_order(code: CodebookCode, values: Tensor) -> CodebookCode:
    """Return `code` with other `values` (out, k), in any order; where one is not finite the old value stays."""
    usable = torch.where(values.isfinite(), values, code.values.to(values))
    ascending, order = usable.sort(1)
    return CodebookCode(torch.argsort(order, 1).gather(1, code.codes.long()).to(torch.uint8), ascending)
