"""Solved rows, or the plain ones where these cost less: no row comes out worse than without a solver."""

import torch
from torch import Tensor

from hesse.constraints import GridCode, Grouped, Sparse, SparseCode
from hesse.curvature import Curvature, Gram
from hesse.solvers.base import member_cost
from hesse.solvers.refit import refit_rows, refit_whole


def cheaper_rows(gram: Gram, grid: Grouped, weight: Tensor, solved: GridCode, plain: GridCode) -> GridCode:
    """Of two codes with the same scales, row by row the one that costs less."""
    rows = rows_cheaper_plain(gram, weight, grid.decode(solved), grid.decode(plain))
    return GridCode(torch.where(rows, plain.codes, solved.codes), solved.scales)


def refit_or_keep(
    curvature: Curvature, sparse: Sparse, weight: Tensor, start: Tensor, kept: Tensor, steps: int
) -> SparseCode:
    """The weights that are `kept` (out, in), refitted from `start`, or as they were where that costs less.

    Under a Gram that is judged row by row, under other curvatures, which couple rows, as a whole.
    """
    if isinstance(curvature, Gram):
        solved = refit_rows(weight, start, kept, curvature, steps)
        rows = rows_cheaper_plain(curvature, weight, solved, weight * kept)
        return sparse.encode_masked(torch.where(rows, weight, solved), kept)
    solved = refit_whole(weight, start, kept, curvature, steps)
    codes = [sparse.encode_masked(values, kept) for values in (solved, weight)]
    return min(codes, key=lambda code: member_cost(curvature, sparse, code, weight))


def rows_cheaper_plain(gram: Gram, weight: Tensor, solved: Tensor, plain: Tensor, together: int = 1) -> Tensor:
    """True (out / together, 1) where so many rows of the plain member cost less than those of the solved one."""
    costs = [gram.row_quadratics(member - weight).view(-1, together).sum(1) for member in (plain, solved)]
    return (costs[0] < costs[1])[:, None]
