"""The best low rank under a curvature that is a product of two sides: truncated SVD in their metric."""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hesse.constraints import Constraint, LowRank, LowRankCode
from hesse.constraints.low_rank import factors_of
from hesse.curvature import Curvature, Diagonal, Gram, Identity, Kronecker
from hesse.errors import ConditioningError, UnsupportedProduct
from hesse.solvers.base import Solver, float32_bytes, require_constraint
from hesse.solvers.linear.triangular import kronecker_root


class Sides(NamedTuple):
    """Factors C with C Cᵀ the metric of the outputs (rows) and of the inputs (columns); None is the identity."""

    outputs: Tensor | None  # (out, out) lower triangular, or (out,) diagonal
    inputs: Tensor | None


@dataclass(frozen=True)
class WhitenedSVD(Solver):
    """Find the best low rank in closed form: min ‖G^½ (W - LR) A^½‖ over rank-r LR.

    Use it for every LowRank: it is exact for the curvatures below.

    Equivalent to an SVD of C_Gᵀ W C_A, then the inverses on both sides: the Eckart-Young theorem in a metric of two
    sides. For language models SVD-LLM (Wang et al., 2024) and EoRA (Liu et al., 2024) on the inputs' side, FWSVD (Hsu
    et al., 2022) with a diagonal there, LQ-LoRA (Guo et al., 2023) with diagonals on both.

    The curvature must be an Identity, a Gram (A alone), a Diagonal of the inputs (in,), or a Kronecker (out, in) with
    positive definite factors. Columns of weight 0 in a diagonal come out as zero.
    """

    def init(self, curvature: Curvature) -> Sides:
        if isinstance(curvature, Identity):
            return Sides(None, None)
        if isinstance(curvature, Gram):
            return Sides(None, curvature.factor)
        if isinstance(curvature, Diagonal) and curvature.values.ndim == 1:
            return Sides(None, (curvature.values + curvature.damping).sqrt())
        if isinstance(curvature, Kronecker) and not curvature.transposed:
            return Sides(_root(curvature.output_factor), _root(curvature.input_factor))
        raise UnsupportedProduct(
            "WhitenedSVD needs an Identity, a Gram, a Diagonal of inputs (in,) or a Kronecker, not a "
            f"{type(curvature).__name__} {tuple(curvature.shape)}: rows and columns of single weights have no SVD"
        )

    def compute(self, state: Sides, weight: Tensor, constraint: Constraint) -> LowRankCode:
        constraint = require_constraint(self, constraint, LowRank)
        outputs, inputs = (None if side is None else side.to(weight.dtype) for side in state)
        left, right = factors_of(_whitened(state, weight), constraint.rank)
        return constraint.encode_factors(_over(left.T, outputs).T, _over(right, inputs))

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        if issubclass(curvature, Kronecker):
            factoring = max(float32_bytes(shape, outputs=3), float32_bytes(shape, inputs=3, outputs=1))
            return max(factoring, float32_bytes(shape, weights=4.2, inputs=1, outputs=1))
        if issubclass(curvature, Gram):
            return max(float32_bytes(shape, inputs=2.1), float32_bytes(shape, weights=4.2, inputs=1))
        return float32_bytes(shape, weights=4.2)

    def values(self, state: Sides, weight: Tensor) -> Tensor:
        """Return the singular values of C_Gᵀ W C_A in falling order: leaving out the k-th costs half its square."""
        return cast(Tensor, torch.linalg.svdvals(_whitened(state, weight)))


def _whitened(state: Sides, weight: Tensor) -> Tensor:
    """Return C_Gᵀ W C_A."""
    outputs, inputs = (None if side is None else side.to(weight.dtype) for side in state)
    # Transposed, the outputs' side is one of columns too.
    return _times(_times(weight, inputs).T, outputs).T


def _times(matrix: Tensor, side: Tensor | None) -> Tensor:
    """Return `matrix` times C, the `side`."""
    if side is None:
        return matrix
    return matrix * side if side.ndim == 1 else matrix @ side


def _over(matrix: Tensor, side: Tensor | None) -> Tensor:
    """Return `matrix` times C⁻¹, of the `side` C."""
    if side is None or side.ndim == 1:
        return matrix if side is None else torch.where(side > 0, matrix / side, 0)
    return cast(Tensor, torch.linalg.solve_triangular(side, matrix, upper=False, left=False))


def _root(factor: Tensor) -> Tensor:
    """Return C with C Cᵀ = factor."""
    if factor.ndim == 1:
        if not bool((factor > 0).all()):
            raise ConditioningError("a Kronecker factor is singular: use more damping (with_damped_factors)")
        return factor.sqrt()
    return kronecker_root(factor).to(factor.dtype)
