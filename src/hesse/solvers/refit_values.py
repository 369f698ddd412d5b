"""The best values of codebooks for codes that are chosen."""

import torch
from torch import Tensor

from hesse.constraints import CodebookCode
from hesse.curvature import Curvature
from hesse.solvers.conjugate_steps import conjugate_steps


def refit_values(code: CodebookCode, slope: Tensor, curvature: Curvature, steps: int) -> Tensor:
    """Values (out, k) that lower ½ dᵀHd, d = values[codes] - weight, from those of `code` on; not rounded or sorted.

    `slope` (out, in) is H d for the values of `code`. Least squares, as in `refit_scales`. A value that no code takes
    stays.
    """
    codes = code.codes.long()
    values = code.values.to(slope.dtype)

    def sums(matrix: Tensor) -> Tensor:
        """Over the weights of a row that have one value."""
        return torch.zeros_like(values).scatter_add(1, codes, matrix)

    def product(change: Tensor) -> Tensor:
        return sums(curvature.matvec(change.gather(1, codes)))

    metric = sums(curvature.diagonal().to(slope.dtype).expand_as(slope))
    residual = torch.where(metric > 0, -sums(slope), 0)
    return conjugate_steps(values, residual, metric, product, steps)


def in_order(code: CodebookCode, values: Tensor) -> CodebookCode:
    """The codes of `code` with other `values` (out, k), which need not ascend; those that are not finite stay."""
    usable = torch.where(values.isfinite(), values, code.values.to(values))
    ascending, order = usable.sort(1)
    places = torch.argsort(order, 1)
    return CodebookCode(places.gather(1, code.codes.long()).to(torch.uint8), ascending)
