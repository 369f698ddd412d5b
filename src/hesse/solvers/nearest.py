"""Each weight on its own: round to nearest, magnitude pruning, Wanda, plain SVD."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hesse.constraints import Constraint
from hesse.curvature import Curvature, Diagonal, Identity, Kronecker
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver


@dataclass(frozen=True)
class Nearest(Solver):
    """The nearest member in a metric without interactions, for which it is exact.

    An Identity, a Diagonal, or a Kronecker of two diagonals.

    Use it as the baseline, where there is no calibration data, or where time matters most.
    """

    def init(self, curvature: Curvature) -> Tensor | None:
        if isinstance(curvature, Identity):
            return None
        if isinstance(curvature, Diagonal) or (isinstance(curvature, Kronecker) and _is_diagonal(curvature)):
            return curvature.diagonal()
        raise UnsupportedProduct(
            f"Nearest cannot use the interactions of a {type(curvature).__name__}: "
            "pass its diagonal_part(), or use ErrorFeedback"
        )

    def compute(self, state: Tensor | None, weight: Tensor, constraint: Constraint) -> Any:
        return constraint.encode(weight, state)


def _is_diagonal(kronecker: Kronecker) -> bool:
    return all(factor.ndim == 1 for factor in kronecker.factors)
