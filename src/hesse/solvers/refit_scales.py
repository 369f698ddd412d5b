"""The best scales for codes that are chosen."""

import torch
from torch import Tensor

from hesse.constraints import Grid, GridCode
from hesse.curvature import Curvature
from hesse.solvers.conjugate_steps import conjugate_steps


def refit_scales(code: GridCode, slope: Tensor, curvature: Curvature, grid: Grid, steps: int) -> Tensor:
    """Scales (out, groups) that lower ½ dᵀHd, d = codes · scales - weight, from those of `code` on; not rounded.

    `slope` (out, in) is H d for the scales of `code`. A least-squares problem, on which conjugate gradients,
    preconditioned by the diagonal of H over the codes, take `steps` steps: one product with H each. No step raises the
    cost, beyond rounding. A group whose codes are all zero keeps its scale.
    """
    columns = slope.shape[1]
    codes = code.codes.to(slope.dtype)
    if code.scales.zero_point is not None:
        codes = codes - grid.expand(code.scales.zero_point, columns)

    def by_group(values: Tensor) -> Tensor:
        width = grid.group_width(columns)
        padded = torch.nn.functional.pad(values, (0, grid.groups(columns) * width - columns))
        return padded.view(len(values), -1, width).sum(-1)

    def product(scale: Tensor) -> Tensor:
        return by_group(codes * curvature.matvec(codes * grid.expand(scale, columns)))

    scale = code.scales.scale.to(slope.dtype)
    metric = by_group(codes.square() * curvature.diagonal().to(slope.dtype))
    residual = torch.where(metric > 0, -by_group(codes * slope), 0)
    return conjugate_steps(scale, residual, metric, product, steps)
