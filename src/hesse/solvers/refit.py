"""The best values of the weights that a mask keeps."""

import torch
from torch import Tensor

from hesse.curvature import Gram


def refit(weight: Tensor, start: Tensor, kept: Tensor, gram: Gram, steps: int) -> Tensor:
    """Lower ½ tr(d (A + λI) dᵀ), d = result - weight, over the values where `kept` is true; zeros elsewhere.

    `start` (out, in) is zero where `kept` is not. Each row is a least-squares problem of its own with its own columns,
    and all rows take one step of conjugate gradients together, preconditioned by the diagonal: two matrix products for
    what no factorisation could share. No step makes a row worse, beyond rounding.

    The problem is that of ADMM's weight update for pruning (Boža, 2024); the steps are Hestenes and Stiefel's (1952).
    """
    metric = gram.second_moment.to(weight.dtype) + gram.damping * torch.eye(weight.shape[1]).to(weight)
    scale = metric.diagonal().clamp(min=torch.finfo(weight.dtype).tiny)
    result = start
    residual = -((result - weight) @ metric) * kept
    direction = residual / scale
    strength = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        product = (direction @ metric) * kept
        length = strength / (direction * product).sum(1, keepdim=True)
        length = torch.where(length.isfinite(), length, 0)  # a row that is solved
        result = result + length * direction
        residual = residual - length * product
        scaled = residual / scale
        before, strength = strength, (residual * scaled).sum(1, keepdim=True)
        ratio = strength / before
        direction = scaled + torch.where(ratio.isfinite(), ratio, 0) * direction
    return result
