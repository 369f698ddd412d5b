"""Inverses of triangular matrices."""

import torch
from torch import Tensor

LEAF = 128  # rows; below this a product is too small to run at full rate


def inverse_of(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix (n, n).

    By halves, whose inverses make up the rest in two products: two thirds of what solving for the identity takes, and
    at the rate of products.
    """
    inverse = torch.zeros_like(lower)

    def fill(start: int, stop: int) -> None:
        own = slice(start, stop)
        if stop - start <= LEAF:
            identity = torch.eye(stop - start).to(lower)
            inverse[own, own] = torch.linalg.solve_triangular(lower[own, own], identity, upper=False)
            return
        middle = (start + stop) // 2
        first, second = slice(start, middle), slice(middle, stop)
        fill(start, middle)
        fill(middle, stop)
        inverse[second, first] = (inverse[second, second] @ (lower[second, first] @ inverse[first, first])).neg_()

    fill(0, len(lower))
    return inverse
