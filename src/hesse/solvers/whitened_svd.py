"""The best low rank for a layer's outputs: truncated SVD in the inputs' own metric."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, LowRank, LowRankCode
from hesse.curvature import Curvature, Gram
from hesse.errors import UnsupportedProduct


@dataclass(frozen=True)
class WhitenedSVD:
    """min ‖(W - LR) A^½‖ over rank-r LR, in closed form: SVD of W C with A = C Cᵀ, then C⁻¹ on the right.

    Exact for a Gram. Source: the Eckart-Young theorem in the metric A; for language models SVD-LLM (Wang et al.,
    2024) and EoRA (Liu et al., 2024).
    """

    def init(self, curvature: Curvature) -> Tensor:
        if not isinstance(curvature, Gram):
            raise UnsupportedProduct(
                f"WhitenedSVD needs a Gram, not a {type(curvature).__name__}; for plain SVD use Nearest with Identity"
            )
        return curvature.factor

    def compute(self, state: Tensor, weight: Tensor, constraint: Constraint) -> LowRankCode:
        if not isinstance(constraint, LowRank):
            raise UnsupportedProduct(f"WhitenedSVD solves LowRank, not {type(constraint).__name__}")
        factor = state.to(weight.dtype)
        left, values, right = torch.linalg.svd(weight @ factor, full_matrices=False)
        root = values[: constraint.rank].sqrt()
        whitened = root[:, None] * right[: constraint.rank]
        unwhitened = torch.linalg.solve_triangular(factor, whitened, upper=False, left=False)
        return constraint.encode_factors(left[:, : constraint.rank] * root, unwhitened)
