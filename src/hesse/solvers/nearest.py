"""Round to nearest, magnitude pruning, Wanda and plain SVD: the projection in a metric without interactions."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hesse.constraints import Constraint
from hesse.curvature import Curvature, Diagonal, Identity, Kronecker
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver


@dataclass(frozen=True)
class Nearest(Solver):
    """Project each weight alone: round to nearest, magnitude pruning, Wanda, plain SVD.

    Use it as the baseline, where there is no calibration data, or where time matters most.

    Equivalent to `constraint.encode(weight, curvature.diagonal())`; with a Sparse and the diagonal of a Gram it is
    Wanda (Sun et al., 2023), with a LowRank under an Identity the truncated SVD.

    The curvature must have no interactions, so that the projection is exact: an Identity, a Diagonal, or a Kronecker of
    two diagonals.
    """

    def init(self, curvature: Curvature) -> Tensor | None:
        if isinstance(curvature, Identity):
            return None
        two_diagonals = isinstance(curvature, Kronecker) and all(factor.ndim == 1 for factor in curvature.factors)
        if two_diagonals or isinstance(curvature, Diagonal):
            return curvature.diagonal()
        raise UnsupportedProduct(
            f"Nearest cannot use the interactions of a {type(curvature).__name__}: "
            "pass its diagonal_part(), or use ErrorFeedback"
        )

    def compute(self, state: Tensor | None, weight: Tensor, constraint: Constraint) -> Any:
        return constraint.encode(weight, state)
