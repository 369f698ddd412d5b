"""The best values of the weights that a mask keeps, under any curvature with products."""

from torch import Tensor

from hesse.curvature import Curvature
from hesse.solvers.conjugate_steps import conjugate_steps


def masked_refit(weight: Tensor, start: Tensor, kept: Tensor, curvature: Curvature, steps: int) -> Tensor:
    """Lower ½ dᵀHd, d = result - weight (out, in), over the values where `kept` is true; zeros elsewhere.

    `start` is zero where `kept` is not. One problem of all kept weights: `steps` of conjugate gradients, preconditioned
    by the diagonal, each one product with H. No step raises the cost, beyond rounding. Where rows are problems of
    their own, `refit` gives each its own lengths of steps.
    """
    residual = -curvature.matvec(start - weight) * kept
    metric = curvature.diagonal().to(weight.dtype).expand(weight.shape)
    return conjugate_steps(start, residual, metric, lambda direction: curvature.matvec(direction) * kept, steps)
