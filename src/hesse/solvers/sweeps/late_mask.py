"""A mask that a sweep over columns decides as late as possible."""

import torch
from torch import Tensor

from hesse.constraints.sparse import Sparse, smallest

SAMPLE = 1 << 12  # scores


class LateMask:
    """A mask (in, out) decided a few columns at a time, by the current cost of dropping a weight: (w_j / U_jj)².

    These scores become outdated as errors reach later columns, so few columns are decided together (M for N:M, whole
    blocks). An unstructured mask distributes the dropped weights over columns as one mask of all columns would: a block
    gets the share of the remaining drops that a mask of all remaining columns would give it, and its next columns the
    share that a mask of the block's remaining columns would give them.
    """

    def __init__(self, sparse: Sparse, work: Tensor, pivots: Tensor, columns_at_once: int) -> None:
        self.sparse = sparse
        self.work = work  # (in, out), the sweep's own
        self.pivots = pivots  # U_jj (in,)
        self.kept = torch.ones_like(work, dtype=torch.bool)
        self.columns_at_once = sparse.columns_at_once(columns_at_once)
        # How many weights or blocks a share has left to drop, of the matrix (1,) or of each row (out,).
        self._left = sparse.drop_counts(work.T) if sparse.of is None else None
        self._left_in_block: Tensor | None = None
        self._stop = 0

    def enter(self, start: int, stop: int) -> None:
        """Begin the block of columns [start, stop), which has received the errors of all columns before it."""
        self._stop = stop
        if self._left is not None:
            self._left_in_block = self._due(start, stop, len(self.work), self._left)
            self._left = self._left - self._left_in_block

    def decide(self, start: int) -> None:
        """Decide the columns of the block from `start` on that are decided together."""
        stop, dropped = min(start + self.columns_at_once, self._stop), None
        if self._left_in_block is not None:
            dropped = self._due(start, stop, self._stop, self._left_in_block)
            self._left_in_block = self._left_in_block - dropped
        self.kept[start:stop] = self.sparse.mask(self._scores(start, stop).T, dropped).T

    def _scores(self, start: int, stop: int) -> Tensor:
        return (self.work[start:stop] / self.pivots[start:stop, None]).square()

    def _due(self, start: int, now: int, stop: int, left: Tensor) -> Tensor:
        """Return how many of `left` fall before column `now` if one mask drops them from the columns [start, stop)."""
        scores = self.sparse.of_blocks(self._scores(start, stop).T).T
        grouped = scores.reshape(1, -1) if len(left) == 1 else scores.T
        early = grouped[:, : (now - start) * grouped.shape[1] // (stop - start)]
        due = (early <= _threshold(grouped, left)).sum(1)
        room = grouped.shape[1] - early.shape[1]
        return torch.minimum(torch.maximum(due, left - room), left)


def _threshold(scores: Tensor, number: Tensor) -> Tensor:
    """Return about the number-th smallest of each row of `scores` (rows, n), `number` (rows,) a row, as (rows, 1).

    For one long row it is estimated from every n-th score; later columns correct the error.
    """
    if len(scores) > 1:
        return smallest(scores, number[:, None])
    step = max(scores.shape[1] // SAMPLE, 1) | 1  # odd, to meet all rows of the weight
    sample = scores[:, ::step]
    return smallest(sample, (number / step).round().long().clamp(max=sample.shape[1])[:, None])
