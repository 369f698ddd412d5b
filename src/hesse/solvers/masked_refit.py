"""The best values of the weights that a mask keeps, under any curvature with products."""

import torch
from torch import Tensor

from hesse.curvature import Curvature


def masked_refit(weight: Tensor, start: Tensor, kept: Tensor, curvature: Curvature, steps: int) -> Tensor:
    """Lower ½ dᵀHd, d = result - weight (out, in), over the values where `kept` is true; zeros elsewhere.

    `start` is zero where `kept` is not. One problem of all kept weights: `steps` of conjugate gradients, preconditioned
    by the diagonal, each one product with H. No step raises the cost, beyond rounding. Where rows are problems of
    their own, `refit` gives each its own lengths of steps.
    """
    metric = curvature.diagonal().to(weight.dtype).expand(weight.shape)
    metric = torch.where(metric > 0, metric, 1)
    result = start
    residual = -curvature.matvec(result - weight) * kept
    direction = residual / metric
    strength = (residual * direction).sum()
    for _ in range(steps):
        product = curvature.matvec(direction) * kept
        bend = (direction * product).sum()
        if not (strength > 0 and bend > 0):
            break
        length = strength / bend
        result = result + length * direction
        residual = residual - length * product
        scaled = residual / metric
        before, strength = strength, (residual * scaled).sum()
        direction = scaled + strength / before * direction
    return result
