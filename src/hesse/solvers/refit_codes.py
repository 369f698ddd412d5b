"""The best scales of a grid, and the best values of a codebook, for codes that are already chosen."""

import torch
from torch import Tensor

from hesse.constraints import CodebookCode, Grid, GridCode
from hesse.curvature import Curvature
from hesse.solvers.linear.conjugate_gradients import conjugate_steps


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
    residual = torch.where(metric > 0, -sums(slope), 0)
    return conjugate_steps(values, residual, metric, product, steps)


def in_order(code: CodebookCode, values: Tensor) -> CodebookCode:
    """Return `code` with other `values` (out, k), in any order; where one is not finite the old value stays."""
    usable = torch.where(values.isfinite(), values, code.values.to(values))
    ascending, order = usable.sort(1)
    places = torch.argsort(order, 1)
    return CodebookCode(places.gather(1, code.codes.long()).to(torch.uint8), ascending)
