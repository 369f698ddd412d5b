"""Error feedback over columns: GPTQ, LDLQ and SparseGPT, the updates of Optimal Brain Surgeon in one shared order."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from hesse.constraints import (
    Codebook,
    CodebookCode,
    Constraint,
    GridCode,
    Grouped,
    Scales,
    Sparse,
    SparseCode,
    SparseGrid,
)
from hesse.curvature import Curvature, Gram
from hesse.errors import ConditioningError, UnsupportedProduct
from hesse.solvers import codebook_feedback
from hesse.solvers.base import Solver, float32_bytes
from hesse.solvers.linear.triangular import backwards_in, inverse_of, read_backwards
from hesse.solvers.never_worse import cheaper_rows, refit_or_keep
from hesse.solvers.sweeps import columns, kernels
from hesse.solvers.sweeps.columns import ColumnBlock, sweep_blocks
from hesse.solvers.sweeps.late_mask import LateMask

Walk = Callable[[ColumnBlock, int, int, Grouped | None], None]


@dataclass(frozen=True, eq=False)
class FeedbackState:
    """A Gram, the order of its columns in the sweep, and its inverse in that order as (A + λI)⁻¹ = UᵀU."""

    curvature: Gram
    order: Tensor | None  # (in,) column indices; None for the given order
    feedback: Tensor  # (in, in) U_j / U_jj, unit upper triangular: it takes the plain error of a column, undivided
    pivots: Tensor  # (in,) U_jj

    @property
    def columns(self) -> Tensor:
        """The column indices (in,) in the order of the sweep."""
        return _columns(self.curvature, self.order)


@dataclass(frozen=True)
class ErrorFeedback(Solver):
    """Round or prune one column after another, and let the columns after it compensate for its error.

    Use it for grids, tables, codebooks and zeros wherever there are calibration inputs but no gradients: it costs one
    Cholesky factor and one product of the size of the weight. Use TwoSidedFeedback where the loss's curvature is known.

    Equivalent to GPTQ (Frantar et al., 2022) on grids, to LDLQ (QuIP; Chee et al., 2023), which rounds the same, and to
    SparseGPT (Frantar and Alistarh, 2023) on zeros; the plain loop is `hesse.solvers._reference.gptq`. For column j
    with allowed value d: e = (w_j - d) / U_jj, and w_k -= e U_jk for every later column k, with (A + λI)⁻¹ = UᵀU. Ours
    on top: no row is worse than by plain rounding or zeroing on the same grid and mask; an unstructured mask is decided
    `mask_columns` columns at a time; weights kept without a Grid are refitted by `refit_steps` of conjugate gradients,
    since the sweep cannot change a column when later columns are dropped; the values of a Codebook are those of k-means
    weighted by E[x²], refitted to the codes at the end.

    The curvature must be a Gram, damped where it is singular. `order="descending"` takes the columns with the largest
    E[x²] first; the scales of a Grid are then fitted before the sweep, so that groups stay contiguous on disk. Float32
    weights are swept by a compiled loop, on a GPU with Triton by a kernel; others by a few operations per column.
    """

    curvatures = (Gram,)

    order: Literal["given", "descending"] = "given"
    block_size: int = 128  # columns whose errors reach those beyond them in one product
    mask_columns: int = 16
    refit_steps: int = 8

    def init(self, curvature: Curvature) -> FeedbackState:
        gram, order = super().init(curvature), None
        if self.order == "descending":
            order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        return FeedbackState(gram, order, *inverse_factor(gram, order))

    def compute(
        self, state: FeedbackState, weight: Tensor, constraint: Constraint
    ) -> GridCode | SparseCode | CodebookCode:
        if isinstance(constraint, Codebook):
            how = state.curvature, state.columns, state.feedback, self.block_size, self.refit_steps
            return codebook_feedback.feed_back_codebook(constraint, weight, *how)
        grid, sparse = _parts(constraint)
        if sparse is not None and sparse.together > 1 and state.order is not None:
            raise UnsupportedProduct('N:M groups and blocks are of neighbours: use ErrorFeedback(order="given")')
        order = state.columns
        sweep = _Sweep(weight.T.contiguous()[order], state, grid, sparse, self.mask_columns)
        late = state.order is None or (grid is not None and grid.group_width(weight.shape[1]) == 1)
        if grid is not None and not late:
            sweep.set_scales(0, grid, grid.fit(weight), order)
        sweep.run(self._block_size(weight.shape[1], grid, sparse), fit_scales=late)

        back = torch.argsort(order)
        if grid is None:
            assert sparse is not None
            kept = sweep.kept[back].T
            return refit_or_keep(state.curvature, sparse, weight, sweep.work[back].T, kept, self.refit_steps)
        scales = sweep.scales(grid, back)
        solved_code = GridCode(sweep.codes[back].T.contiguous(), scales)
        plain_code = grid.round(weight if sparse is None else weight * sweep.kept[back].T, scales)
        return cheaper_rows(state.curvature, grid, weight, solved_code, plain_code)

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        inverting = float32_bytes(shape, inputs=4.1)
        if isinstance(constraint, Codebook):
            return max(inverting, float32_bytes(shape, weights=9, inputs=2) + constraint.workspace(shape))
        return max(inverting, float32_bytes(shape, weights=13, inputs=2))

    def _block_size(self, columns: int, grid: Grouped | None, sparse: Sparse | None) -> int:
        """Return the columns of a block, a multiple of the columns that are decided together."""
        unit = 1
        if grid is not None and grid.group_width(columns) < columns:
            unit = grid.group_width(columns)
        if sparse is not None:
            unit = math.lcm(unit, sparse.columns_at_once(self.mask_columns))
        return max(self.block_size // unit, 1) * unit


class _Sweep:
    """The sweep over columns, on the transposed weight so that a column is contiguous; all tensors are (in, out)."""

    def __init__(
        self, work: Tensor, state: FeedbackState, grid: Grouped | None, sparse: Sparse | None, mask_columns: int
    ) -> None:
        self.work = work
        self.feedback = state.feedback.to(work)
        self.grid = grid
        # Of each column, in the order of the sweep.
        self.grids = None if grid is None else [grid.at(column) for column in state.columns.tolist()]
        self.group = 0  # columns whose scales are fitted once the first is reached; 0 where all are set before
        pivots = state.pivots.to(work)
        self.mask = LateMask(sparse, self.work, pivots, mask_columns) if sparse is not None else None
        self.kept = self.work[:0].bool() if self.mask is None else self.mask.kept
        # Codes are kept as they are chosen: two 8-bit codes can round to one value in bfloat16.
        self.codes = torch.zeros_like(self.work, dtype=torch.int8) if grid is not None else self.work[:0]
        self.scale = torch.empty_like(self.work) if grid is not None else None
        self.zero_point = torch.zeros_like(self.work) if grid is not None and not grid.symmetric else None

    def set_scales(self, start: int, grid: Grouped, scales: Scales, order: Tensor | None = None) -> None:
        """Expand scales per group to the columns from `start` on, in `order`."""
        for target, source in ((self.scale, scales.scale), (self.zero_point, scales.zero_point)):
            if target is not None and source is not None:
                columns = len(self.work) if order is not None else grid.group_width(len(self.work))
                spread = grid.expand(source, columns).T if order is not None else source.T
                stop = min(start + columns, len(self.work))
                target[start:stop] = spread if order is None else spread[order]

    def scales(self, grid: Grouped, back: Tensor) -> Scales:
        """Return the scales used, one a group (out, groups); `back` restores the columns' own order."""
        assert self.scale is not None
        step = grid.group_width(len(self.work))
        zero_point = None if self.zero_point is None else self.zero_point[back][::step].T
        return Scales(self.scale[back][::step].T, zero_point)

    def run(self, block_size: int, fit_scales: bool) -> None:
        """Replace `work` by allowed values, column after column."""
        self.group = self.grid.group_width(len(self.work)) if self.grid is not None and fit_scales else 0
        whole_steps = self.grids is None or all(grid.bounds is not None for grid in self.grids)
        walk = _compiled_walk(self.work) if whole_steps else None
        sweep_blocks(self.work, self.feedback, block_size, partial(self._walk, walk or columns.walk_by_operations))

    def _walk(self, walk: Walk, start: int, stop: int, errors: Tensor, factor: Tensor) -> None:
        """Replace the columns [start, stop) by allowed values and fill their `errors`: a call between two decisions."""
        if self.mask is not None:
            self.mask.enter(start, stop)
        parts = (
            None if self.grid is None else self.codes,
            self.scale,
            self.zero_point,
            None if self.mask is None else self.kept,
        )
        codes, scale, zero_point, kept = (None if part is None else part[start:stop] for part in parts)
        block = ColumnBlock(self.work[start:stop], errors, codes, scale, zero_point, kept, factor.contiguous())
        decisions = [j for j in range(start, stop) if j == start or self._decides(j)]
        for first, last in pairwise([*decisions, stop]):
            self._decide(first)
            walk(block, first - start, last - start, None if self.grids is None else self.grids[first])

    def _decides(self, j: int) -> bool:
        """Return True if scales, mask or grid of column `j` are decided, or change, when the sweep reaches it."""
        return (
            (self.group > 0 and j % self.group == 0)
            or (self.mask is not None and j % self.mask.columns_at_once == 0)
            or (self.grids is not None and self.grids[j] != self.grids[j - 1])
        )

    def _decide(self, j: int) -> None:
        """Decide what column `j` needs: the scales of its group, the mask of the columns from `j` on."""
        if self.group and j % self.group == 0:
            assert self.grid is not None and self.grids is not None
            self.set_scales(j, self.grid, self.grids[j].fit(self.work[j : j + self.group].T))
        if self.mask is not None and j % self.mask.columns_at_once == 0:
            self.mask.decide(j)


def _compiled_walk(work: Tensor) -> Walk | None:
    """Return the compiled loop for weights of this type and device, if there is one."""
    if work.dtype != torch.float32:
        return None
    if not kernels.run_on(work.device):
        return columns.walk if work.device.type == "cpu" else None
    from hesse.solvers.sweeps.kernels.columns import walk

    return walk


def _parts(constraint: Constraint) -> tuple[Grouped | None, Sparse | None]:
    if isinstance(constraint, Grouped):
        return constraint, None
    if isinstance(constraint, Sparse):
        return None, constraint
    if isinstance(constraint, SparseGrid):
        return constraint.grid, constraint.sparse
    raise UnsupportedProduct(f"ErrorFeedback has no columns to round or drop in a {type(constraint).__name__}")


def inverse_factor(gram: Gram, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return U_j / U_jj (in, in) and U_jj (in,) of the upper triangular U with (A + λI)⁻¹ = UᵀU, in `order`.

    U is the inverse, read backwards, of the Cholesky factor L of A in reverse order: one factorization instead of
    three, and better conditioned. It is computed in float32, and again in float64 where that fails.

    Raises:
        ConditioningError: A + λI is not positive definite to working precision.
    """
    moment = backwards_in(gram.second_moment, _columns(gram, order))
    backwards = Gram(second_moment=moment, tokens=gram.tokens, damping=gram.damping)
    try:
        lower = backwards.factor
    except ConditioningError:
        lower = Gram(second_moment=moment.double(), tokens=gram.tokens, damping=gram.damping).factor
    inverse = inverse_of(lower)
    # float64 factorizes what is only rounding noise in float32, so check again what A itself resolves.
    if not backwards.resolves(inverse.square().sum(0)):
        raise gram.singular()
    return read_backwards(inverse.to(moment.dtype))


def _columns(gram: Gram, order: Tensor | None) -> Tensor:
    return torch.arange(gram.shape[0], device=gram.device) if order is None else order
