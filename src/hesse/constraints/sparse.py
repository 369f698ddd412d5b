"""S = matrices with a given share of zeros: anywhere, by blocks of neighbours, or N kept of every M."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, round_to
from hesse.constraints.grid import Grid
from hesse.constraints.grouped import GridCode
from hesse.errors import OptionError


@dataclass(frozen=True, eq=False)
class SparseCode:
    """A sparse matrix as its mask (out, in) of kept weights and their values in row-major order."""

    mask: Tensor
    values: Tensor


@dataclass(frozen=True, eq=True)
class Sparse(Constraint):
    """`Sparse(0.5)`: half of the weights are zero. `Sparse(2, 4)`: of every 4 columns in a row at most 2 are not.

    `Sparse(0.5, block=4)`: zeros come in blocks of 4 neighbours of a row, for processors that skip zero blocks (oBERT,
    Kurtic et al., 2022). `scope` says what the share refers to: the whole matrix ("layer") or each row ("row").
    """

    amount: float = 0.5
    of: int | None = None
    scope: Literal["layer", "row"] = "layer"
    block: int = 1

    def __post_init__(self) -> None:
        if self.of is None and not 0 <= self.amount < 1:
            raise OptionError(f"sparsity is {self.amount}, but must be at least 0 and below 1, such as 0.5")
        if self.of is not None and not (self.amount == int(self.amount) and 1 <= self.amount < self.of):
            raise OptionError(f"sparsity {self.amount:g}:{self.of} must keep N of M with 1 <= N < M, such as 2:4")
        if self.block < 1:
            raise OptionError(f"zeros come in blocks of {self.block}: use 1 or more, such as 4")
        if self.of is not None and self.block > 1:
            raise OptionError(f"sparsity {self.amount:g}:{self.of} has no blocks: leave the pattern or the block out")

    @property
    def rows_are_independent(self) -> bool:
        return self.of is not None or self.scope == "row"

    def check(self, shape: torch.Size) -> None:
        if self.of is not None and shape[1] % self.of:
            raise OptionError(
                f"sparsity {self.amount:g}:{self.of} needs a width divisible by {self.of}, and this one is {shape[1]}: "
                "ignore the layer, or choose another pattern"
            )
        if shape[1] % self.block:
            raise OptionError(
                f"zeros in blocks of {self.block} need a width divisible by {self.block}, and this one is {shape[1]}: "
                "leave the layer out with --ignore, or choose another block"
            )

    @property
    def together(self) -> int:
        """The number of neighbors in a row that are decided together: M of N:M, or a block."""
        return self.of or self.block

    def columns_at_once(self, most: int) -> int:
        """Return how many columns a sweep decides together: whole groups, or `most` columns of single weights."""
        return self.of or math.lcm(most, self.block)

    def of_blocks(self, scores: Tensor) -> Tensor:
        """Return the sums of `scores` (out, in) over blocks (out, in / block)."""
        return scores if self.block == 1 else scores.reshape(len(scores), -1, self.block).sum(-1)

    def mask(self, scores: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Return True at the weights of highest scores (out, in). Exactly the requested number is dropped.

        A block's score is the sum of its weights' scores. `dropped` gives other numbers of single weights or blocks:
        one in all or one per row, as in `scope`.
        """
        if self.of is not None:
            grouped = scores.reshape(scores.shape[0], -1, self.of)
            lowest = grouped.topk(self.of - int(self.amount), dim=-1, largest=False).indices
            return torch.ones_like(grouped, dtype=torch.bool).scatter(-1, lowest, False).view(scores.shape)
        number = (self.drop_counts(scores) if dropped is None else dropped)[:, None]
        blocks = self.of_blocks(scores)
        grouped = blocks if self.scope == "row" else blocks.reshape(1, -1)
        threshold = smallest(grouped, number)
        below, equal = grouped < threshold, grouped == threshold
        drop = below | (equal & (equal.cumsum(1) <= number - below.sum(1, keepdim=True)))
        return ~drop.view(blocks.shape).repeat_interleave(self.block, dim=1)

    def drop_counts(self, weight: Tensor) -> Tensor:
        """Return how many weights or blocks of `weight` (out, in) are dropped, in all (1,) or per row (out,)."""
        rows, number = (1, weight.numel()) if self.scope == "layer" else weight.shape
        return torch.full((rows,), round(self.amount * number / self.block), device=weight.device)

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> SparseCode:
        scores = weight.square() if metric is None else weight.square() * metric
        return self.encode_masked(weight, self.mask(scores))

    def encode_masked(self, weight: Tensor, mask: Tensor) -> SparseCode:
        """Return the stored form of `weight` (out, in) where `mask` is true."""
        return SparseCode(mask, round_to(weight[mask], self.dtype))

    def decode(self, encoded: SparseCode) -> Tensor:
        return torch.zeros_like(encoded.mask, dtype=encoded.values.dtype).masked_scatter(encoded.mask, encoded.values)

    def bits_per_weight(self, shape: torch.Size) -> float:
        """Return the bits of kept values and their positions: a bit per block, or column indices where few are kept."""
        kept = self.amount / self.of if self.of is not None else 1 - self.amount
        place = min(1.0, kept * math.ceil(math.log2(max(shape[1] // self.block, 2))))
        return kept * torch.finfo(self.dtype).bits + place / self.block

    def __and__(self, other: Grid) -> "SparseGrid":
        if not isinstance(other, Grid):
            raise OptionError(f"Sparse can be joined with a Grid, not with {type(other).__name__}")
        return SparseGrid(self, other, dtype=other.dtype)


def smallest(scores: Tensor, number: Tensor) -> Tensor:
    """Return the number-th smallest, from 1, of each row of `scores` (rows, n); `number` and result are (rows, 1)."""
    if len(scores) == 1:  # much faster
        return scores.kthvalue(max(int(number), 1), dim=1, keepdim=True).values
    return scores.sort(1).values.gather(1, (number - 1).clamp(min=0))


@dataclass(frozen=True, eq=True)
class SparseGrid(Constraint):
    """Sparse *and* on a grid: pruned weights have the code of zero. Written `Sparse(2, 4) & Grid(4, 128)`."""

    sparse: Sparse
    grid: Grid

    @property
    def rows_are_independent(self) -> bool:
        return self.sparse.rows_are_independent

    @property
    def together(self) -> int:
        return self.sparse.together

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> GridCode:
        return self.grid.encode(self.sparse.decode(self.sparse.encode(weight, metric)), metric)

    def decode(self, encoded: GridCode) -> Tensor:
        return self.grid.decode(encoded)

    def bits_per_weight(self, shape: torch.Size) -> float:
        """Zeros are stored as codes, so they cost what other codes cost."""
        return self.grid.bits_per_weight(shape)
