"""VPTQ: error feedback over columns, each rounded to the nearest entries of a codebook."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hesse.constraints import Constraint, VectorCode, VectorCodebook
from hesse.curvature import Curvature, Gram
from hesse.solvers.base import Solver, float32_bytes, require_constraint
from hesse.solvers.error_feedback import ErrorFeedback, FeedbackState
from hesse.solvers.never_worse import rows_cheaper_plain
from hesse.solvers.sweeps.columns import sweep_columns


@dataclass(frozen=True)
class VectorFeedback(Solver):
    """Take one column after another to the nearest entries of a codebook of vectors, with error feedback.

    Use it at 1 to 3 bits, where a codebook of vectors stores a layer better than a grid.

    Equivalent to VPTQ (Liu et al., 2024): codebooks by k-means weighted with E[x²], then Optimal Brain Surgeon's update
    from column to column, as in ErrorFeedback. No strip of `length` rows is worse than by k-means alone.

    The curvature must be a Gram, damped where it is singular; the constraint a VectorCodebook.
    """

    curvatures = (Gram,)

    order: Literal["given", "descending"] = "given"
    block_size: int = 128

    def init(self, curvature: Curvature) -> FeedbackState:
        return ErrorFeedback(self.order).init(super().init(curvature))

    def compute(self, state: FeedbackState, weight: Tensor, constraint: Constraint) -> VectorCode:
        constraint = require_constraint(self, constraint, VectorCodebook)
        plain = constraint.encode(weight, state.curvature.diagonal())
        work = weight.T.contiguous()[state.columns]
        codes = plain.codes.new_empty(constraint.books, len(work), work.shape[1] // constraint.length)
        centroids = plain.centroids.to(work)

        def allowed(j: int, column: Tensor) -> Tensor:
            codes[:, j], values = constraint.choose(column.view(-1, constraint.length), centroids)
            return values.flatten()

        sweep_columns(work, state.feedback.to(work), self.block_size, allowed)
        swept = constraint.code(codes[:, torch.argsort(state.columns)].flatten(1), plain.centroids, weight.shape)
        solved, unswept = (constraint.decode(code).to(weight.dtype) for code in (swept, plain))
        heights = rows_cheaper_plain(state.curvature, weight, solved, unswept, constraint.length)
        return VectorCode(torch.where(heights, plain.codes, swept.codes), plain.centroids)

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        inverting = float32_bytes(shape, inputs=4.1)
        return max(inverting, constraint.workspace(shape) + float32_bytes(shape, inputs=1))
