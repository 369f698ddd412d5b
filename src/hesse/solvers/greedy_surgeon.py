"""Optimal Brain Surgeon as published: prune or round weights one by one, always the cheapest next."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hesse.compiled import lost_bits
from hesse.constraints import Constraint, Grid, GridCode, Sparse, SparseCode
from hesse.curvature import BlockRankOneSum, Curvature, Gram
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver, float32_bytes
from hesse.solvers.never_worse import cheaper_rows, refit_or_keep
from hesse.solvers.refit import best_values, kept_part
from hesse.solvers.sweeps import greedy

PADDING = 1e15  # fills the last block: a weight of this size is never the cheapest


@dataclass(frozen=True, eq=False)
class SurgeonState:
    """A curvature and its inverse: (A + λI)⁻¹ (in, in) of every row, or those of the blocks (blocks, size, size)."""

    curvature: Gram | BlockRankOneSum
    inverse: Tensor


@dataclass(frozen=True)
class GreedySurgeon(Solver):
    """Prune or round one weight after another in each row, always the weight that costs least, and move the others.

    Use it for layers up to a thousand wide where quality counts: the order is free, where ErrorFeedback has one order
    for all rows, at out · in³ operations instead of out · in², on one thread.

    Equivalent to Optimal Brain Compression (ExactOBS and OBQ; Frantar and Alistarh, 2022); under a BlockRankOneSum to
    oBERT (Kurtic et al., 2022) with exact costs after every removal, where oBERT uses the first ones for all. A weight
    costs w_p² / (2 [H⁻¹]_pp), or with w_p's distance from its grid in place of w_p, and all remaining weights move by
    -w_p / [H⁻¹]_pp H⁻¹_p. A block Q of neighbors removed together costs ½ w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q and moves the others by
    -H⁻¹E_Q ([H⁻¹]_QQ)⁻¹ w_Q. For an unstructured share over a layer each row is pruned to the end, and the rows are cut
    off where the next weight costs the same in all; the kept values are then refitted by `refit_steps` of conjugate
    gradients. No row is worse than by plain rounding or zeroing on the same grid and mask.

    The curvature must be a Gram (a Grid or a Sparse), or a BlockRankOneSum (a Sparse), damped where it is singular.
    """

    curvatures = (Gram, BlockRankOneSum)

    refit_steps: int = 64

    def init(self, curvature: Curvature) -> SurgeonState:
        accepted: Gram | BlockRankOneSum = super().init(curvature)
        if isinstance(accepted, BlockRankOneSum):
            return SurgeonState(accepted, accepted.inverse_blocks())
        return SurgeonState(accepted, torch.cholesky_inverse(accepted.factor))

    def compute(self, state: SurgeonState, weight: Tensor, constraint: Constraint) -> GridCode | SparseCode:
        if isinstance(constraint, Sparse) and isinstance(state.curvature, BlockRankOneSum):
            return _prune_blocks(state.curvature, state.inverse, weight, constraint)
        if isinstance(constraint, Sparse) and isinstance(state.curvature, Gram):
            number = None if constraint.of is not None else constraint.drop_counts(weight)
            kept = _kept_mask(weight, state.inverse[None], constraint, number)
            return refit_or_keep(state.curvature, constraint, weight, weight * kept, kept, self.refit_steps)
        if isinstance(constraint, Grid) and isinstance(state.curvature, Gram):
            return _round(state.curvature, state.inverse, weight, constraint)
        raise UnsupportedProduct(
            f"GreedySurgeon solves Grid and Sparse under a Gram, Sparse under blocks, not {type(constraint).__name__}"
        )

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        if issubclass(curvature, BlockRankOneSum):
            return float32_bytes(shape, weights=7) + 4 * 5 * held
        return float32_bytes(shape, weights=11 if isinstance(constraint, Sparse) else 6, inputs=5)


def _kept_mask(rows: Tensor, inverses: Tensor, sparse: Sparse, number: Tensor | None) -> Tensor:
    """Return True at the weights of `rows` (rows, n) to keep: all but `number`, in all or per row, or the pattern."""
    work = _on_cpu(rows)
    costs = np.full((len(work), work.shape[1] // sparse.block), np.inf, np.float32)
    turns = np.empty(work.shape, np.int32)
    group, most = (0, 0) if sparse.of is None else (sparse.of, int(sparse.amount))
    greedy.remove_from_rows(work.numpy(), _on_cpu(inverses).numpy(), group, most, sparse.block, costs, turns)
    turn = torch.from_numpy(turns).to(rows.device)
    if number is None:
        return turn == rows.shape[1]
    # A removal is priced at the most expensive one before it, so that rows are cut off in their own order.
    price = torch.from_numpy(costs).cummax(1).values.to(rows.device)
    return turn >= _drop_counts(price, number)[:, None]


def _prune_blocks(curvature: BlockRankOneSum, inverses: Tensor, weight: Tensor, sparse: Sparse) -> SparseCode:
    """Prune under the blocks of a curvature, and solve exactly for the kept values."""
    if sparse.of is None and sparse.scope == "row":
        raise UnsupportedProduct("blocks do not end where rows do: use the scope layer")
    if curvature.block_size % sparse.together:
        raise UnsupportedProduct(f"blocks of {curvature.block_size} weights cut the groups of {sparse.together}")
    blocks = curvature.split(weight)
    filled = torch.arange(blocks.numel(), device=weight.device).view(blocks.shape) >= weight.numel()
    number = sparse.drop_counts(weight) if sparse.of is None else None
    kept = curvature.join(_kept_mask(torch.where(filled, PADDING, blocks), inverses, sparse, number))
    return sparse.encode_masked(best_values(curvature, kept_part(curvature, kept), weight, kept), kept)


def _drop_counts(price: Tensor, number: Tensor) -> Tensor:
    """Return how many removals each row gets, by rising `price` (rows, n), of `number` (1,) in all or (rows,) each."""
    if len(number) == len(price):
        return number
    order = price.flatten().argsort(stable=True)[: int(number)]
    return torch.bincount(order // price.shape[1], minlength=len(price))


def _round(gram: Gram, inverse: Tensor, weight: Tensor, grid: Grid) -> GridCode:
    scales, columns = grid.fit(weight), weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.int8)
    greedy.round_all(
        _on_cpu(weight).numpy(),
        _on_cpu(inverse).numpy(),
        _on_cpu(grid.expand(scales.scale, columns)).numpy(),
        _on_cpu(grid.expand(scales.zeros, columns)).numpy(),
        np.float32(grid.lowest),
        np.float32(grid.highest),
        lost_bits(grid.dtype),
        codes.numpy(),
    )
    found = GridCode(codes.to(weight.device), scales)
    return cheaper_rows(gram, grid, weight, found, grid.round(weight, scales))


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return a contiguous float32 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
