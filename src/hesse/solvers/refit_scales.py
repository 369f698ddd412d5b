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
    codes = grid.steps(code, slope)

    def product(scale: Tensor) -> Tensor:
        return grid.by_group(codes * curvature.matvec(codes * grid.expand(scale, codes.shape[1]))).sum(-1)

    scale = code.scales.scale.to(slope.dtype)
    metric = grid.by_group(codes.square() * curvature.diagonal().to(slope.dtype)).sum(-1)
    residual = torch.where(metric > 0, -grid.by_group(codes * slope).sum(-1), 0)
    return conjugate_steps(scale, residual, metric, product, steps)
