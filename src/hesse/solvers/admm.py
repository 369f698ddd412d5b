"""Pruning by the alternating direction method of multipliers: mask and values of a whole layer together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, Sparse, SparseCode
from hesse.curvature import Curvature, Gram
from hesse.errors import UnsupportedProduct
from hesse.solvers.never_worse import refitted_code


@dataclass(frozen=True, eq=False)
class ADMMState:
    """A Gram with columns scaled to a unit diagonal, A' = A / (s sᵀ), and the inverse that every step multiplies by."""

    curvature: Gram
    scale: Tensor  # s (in,)
    metric: Tensor  # A' (in, in)
    inverse: Tensor  # (A' + ρI)⁻¹ (in, in)


@dataclass(frozen=True)
class ADMM:
    """min ½ tr(d A dᵀ) over sparse weights, by steps between the set and the quadratic model.

    In columns scaled by s: Z = the sparse part of W + U, U += W - Z, W = (A' + ρI)⁻¹ (A'W₀ + ρ(Z - U)). The mask is
    chosen anew, from |W + U|, in the first `mask_steps` of `steps`; then `refit_steps` of conjugate gradients take the
    kept values to their minimum. Choose it where sparsity is high: it weighs all columns at once, where ErrorFeedback
    decides the first ones early; it takes one product a step. Rows come out no worse than with the same mask and
    unchanged weights. Source: Boža, 2024 (arXiv:2401.02938).
    """

    steps: int = 20
    mask_steps: int = 15
    strength: float = 1.0  # ρ
    refit_steps: int = 8

    def init(self, curvature: Curvature) -> ADMMState:
        if not isinstance(curvature, Gram):
            raise UnsupportedProduct(f"ADMM needs a Gram, not a {type(curvature).__name__}")
        moment = curvature.second_moment.clone()
        moment.diagonal().add_(curvature.damping)
        scale = moment.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        metric = moment / (scale[:, None] * scale)
        shifted = metric.clone()
        shifted.diagonal().add_(self.strength)
        return ADMMState(curvature, scale, metric, torch.cholesky_inverse(torch.linalg.cholesky(shifted)))

    def compute(self, state: ADMMState, weight: Tensor, constraint: Constraint) -> SparseCode:
        if not isinstance(constraint, Sparse):
            raise UnsupportedProduct(f"ADMM solves Sparse, not {type(constraint).__name__}")
        scale, metric, inverse = (part.to(weight.dtype) for part in (state.scale, state.metric, state.inverse))
        pulled = (weight * scale) @ metric
        found, dual = weight * scale, torch.zeros_like(weight)
        mask = constraint.mask(found.square())
        for step in range(self.steps):
            if step < self.mask_steps:
                mask = constraint.mask((found + dual).square())
            sparse = (found + dual) * mask
            dual += found - sparse
            found = (pulled + self.strength * (sparse - dual)) @ inverse
        start = found / scale * mask
        return refitted_code(state.curvature, constraint, weight, start, mask, self.refit_steps)
