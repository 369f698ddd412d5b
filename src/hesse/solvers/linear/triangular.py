"""Triangular matrices: roots and inverses."""

import torch
from torch import Tensor

from hesse.errors import ConditioningError

LEAF = 128  # rows; below this a product is too small to run at full rate


def kronecker_root(factor: Tensor) -> Tensor:
    """Return the lower triangular L with L Lᵀ = `factor` (n, n), in float32 or, where that fails, in float64.

    Raises:
        ConditioningError: it is not positive definite.
    """
    for matrix in (factor, factor.double()):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            found: Tensor = lower
            return found
    raise ConditioningError("a Kronecker factor is not positive definite: use more damping (with_damped_factors)")


def inverse_of(lower: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix (n, n).

    Computed by halves, whose inverses give the rest in two products: two thirds of the work of solving for the
    identity, at the rate of products.
    """
    inverse = torch.zeros_like(lower)
    _fill(inverse, lower, lower.new_empty(((len(lower) + 1) // 2) ** 2))
    return inverse


def backwards_in(matrix: Tensor, order: Tensor) -> Tensor:
    """Return `matrix` (n, n) with its rows and columns in the reverse of `order`."""
    return matrix.index_select(0, order.flip(0)).index_select(1, order.flip(0))


def read_backwards(inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return U_j / U_jj (n, n) and U_jj (n,) of the upper triangular U with H⁻¹ = UᵀU.

    `inverse` is L⁻¹ of the Cholesky factor L of H with rows and columns in reverse order.
    """
    upper = inverse.flip(0, 1)
    pivots = upper.diagonal().clone()
    return upper.div_(pivots[:, None]), pivots


def _fill(inverse: Tensor, lower: Tensor, scratch: Tensor) -> None:
    """Write the inverse of `lower` below and on the diagonal of `inverse`; `scratch` holds a quarter of it."""
    size = len(lower)
    if size <= LEAF:
        inverse.copy_(torch.linalg.solve_triangular(lower, torch.eye(size).to(lower), upper=False))
        return
    first, second = slice(0, size // 2), slice(size // 2, size)
    for half in (first, second):
        _fill(inverse[half, half], lower[half, half], scratch)
    between = scratch[: (size - size // 2) * (size // 2)].view(size - size // 2, size // 2)
    torch.mm(lower[second, first], inverse[first, first], out=between)
    inverse[second, first].addmm_(inverse[second, second], between, alpha=-1)
