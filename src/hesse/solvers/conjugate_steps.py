"""A few steps of conjugate gradients down one quadratic, preconditioned by its diagonal: what refits share."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_steps(
    start: Tensor, residual: Tensor, metric: Tensor, product: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """`start` after at most `steps` steps towards the minimum of ½ xᵀQx - bᵀx; of `start`'s shape, as all here is.

    `residual` is b - Q `start`, `metric` the diagonal of Q, where an entry that is not positive counts as 1, and
    `product(v)` is Q v. It ends where rounding leaves no direction that goes down. `conjugate_gradients` solves to a
    tolerance and says how it ended. Source: Hestenes and Stiefel, 1952.
    """
    metric = torch.where(metric > 0, metric, 1)
    result = start
    direction = residual / metric
    strength = (residual * direction).sum()
    for _ in range(steps):
        image = product(direction)
        bend = (direction * image).sum()
        if not (strength > 0 and bend > 0):
            break
        length = strength / bend
        result = result + length * direction
        residual = residual - length * image
        scaled = residual / metric
        before, strength = strength, (residual * scaled).sum()
        direction = scaled + strength / before * direction
    return result
