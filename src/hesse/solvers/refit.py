"""The best values of the weights that a mask keeps."""

from dataclasses import replace

import torch
from torch import Tensor

from hesse.curvature import BlockRankOneSum, Gram, RankOneSum

OfGradients = BlockRankOneSum | RankOneSum


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


def kept_part(curvature: OfGradients, kept: Tensor) -> OfGradients:
    """The same curvature of the weights that are `kept` (*shape) alone: what is gone neither moves nor matters."""
    if isinstance(curvature, RankOneSum):
        masked = RankOneSum.from_gradients(curvature.gradients * kept, curvature.origin)
        return replace(masked, damping=curvature.damping)
    inside = curvature.split(kept.to(curvature.matrices))
    matrices = inside[:, :, None] * curvature.matrices * inside[:, None, :] + torch.diag_embed(1 - inside)
    return replace(curvature, matrices=matrices)


def best_values(curvature: OfGradients, left: OfGradients, weight: Tensor, kept: Tensor) -> Tensor:
    """The values of the weights that are `kept`, zeros elsewhere, at which ½ dᵀ(H + λI)d is least: exact.

    `left` is the `kept_part` of the curvature. w_K + (H_KK + λI)⁻¹ H_KQ w_Q, with Q the weights that are gone; under
    gradients the second term lies in their span.
    """
    gone = torch.where(kept, 0, weight)
    if isinstance(left, RankOneSum) and isinstance(curvature, RankOneSum):
        moved = left.solve_in_span(curvature.along(gone) / len(left.gradients))
    else:
        moved = left.solve(torch.where(kept, curvature.matvec(gone), 0))
    return torch.where(kept, weight + moved.to(weight), 0)
