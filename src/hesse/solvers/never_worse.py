"""Solved rows, or the plain ones where these cost less: no row comes out worse than without a solver."""

import torch
from torch import Tensor

from hesse.constraints import GridCode, Grouped, Sparse, SparseCode
from hesse.curvature import Gram
from hesse.solvers.refit import refit


def cheaper_codes(gram: Gram, grid: Grouped, weight: Tensor, solved: GridCode, plain: GridCode) -> GridCode:
    """Of two codes with the same scales, row by row the one that costs less."""
    rows = _plain_is_cheaper(gram, weight, grid.decode(solved), grid.decode(plain))
    return GridCode(torch.where(rows, plain.codes, solved.codes), solved.scales)


def refitted_code(gram: Gram, sparse: Sparse, weight: Tensor, start: Tensor, kept: Tensor, steps: int) -> SparseCode:
    """The weights that are `kept` (out, in), refitted from `start`, or as they were in rows where that costs less."""
    solved = refit(weight, start, kept, gram, steps)
    rows = _plain_is_cheaper(gram, weight, solved, weight * kept)
    return sparse.encode_masked(torch.where(rows, weight, solved), kept)


def _plain_is_cheaper(gram: Gram, weight: Tensor, solved: Tensor, plain: Tensor) -> Tensor:
    """True (out, 1) where the plain member costs less than the solved one."""
    costs = [gram.row_quadratics(member - weight) for member in (plain, solved)]
    return (costs[0] < costs[1])[:, None]
