"""Keep the plain rows where the solved ones cost more, so that no row is worse than without a solver."""

import torch
from torch import Tensor

from hesse.constraints import GridCode, Grouped, Sparse, SparseCode
from hesse.curvature import Curvature, Gram
from hesse.solvers.base import member_cost
from hesse.solvers.refit import refit_rows, refit_whole


def cheaper_rows(gram: Gram, grid: Grouped, weight: Tensor, solved: GridCode, plain: GridCode) -> GridCode:
    """Return, row by row, the cheaper of two codes with the same scales."""
    rows = rows_cheaper_plain(gram, weight, grid.decode(solved), grid.decode(plain))
    return GridCode(torch.where(rows, plain.codes, solved.codes), solved.scales)


def refit_or_keep(
    curvature: Curvature, sparse: Sparse, weight: Tensor, start: Tensor, kept: Tensor, steps: int
) -> SparseCode:
    """Return the weights that are `kept` (out, in), refitted from `start`, or as they were where that costs less.

    The choice is made row by row under a Gram, and for the whole under other curvatures, which couple rows.
    """
    if isinstance(curvature, Gram):
        solved = refit_rows(weight, start, kept, curvature, steps)
        rows = rows_cheaper_plain(curvature, weight, solved, weight * kept)
        return sparse.encode_masked(torch.where(rows, weight, solved), kept)
    solved = refit_whole(weight, start, kept, curvature, steps)
    codes = [sparse.encode_masked(values, kept) for values in (solved, weight)]
    return min(codes, key=lambda code: member_cost(curvature, sparse, code, weight))


def rows_cheaper_plain(gram: Gram, weight: Tensor, solved: Tensor, plain: Tensor, together: int = 1) -> Tensor:
    """Return True (out / together, 1) where a strip of `together` rows of the plain member costs less."""
    costs = [gram.row_quadratics(member - weight).view(-1, together).sum(1) for member in (plain, solved)]
    return (costs[0] < costs[1])[:, None]
