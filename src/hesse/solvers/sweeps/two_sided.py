"""The sweeps of two-sided rounding over a whole weight, block by block in the compiled loops."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hesse.compiled import lost_bits
from hesse.solvers.sweeps import two_sided_blocks

DESCENT_COLUMNS = 64  # columns whose errors reach those beyond them in one product
TILE = 64  # rows of a block taken one by one; their errors reach the rows beyond them in one product


class GridLevels(NamedTuple):
    """The grid of a transposed weight (in, out), both sides in the order of the sweep; codes count from zero points."""

    scale: Tensor  # (groups, out) float32
    lowest: Tensor  # (groups, out) lowest codes, whole numbers in float32
    highest: Tensor  # (groups, out)
    group: Tensor  # (in,) the group of each column
    dtype: torch.dtype  # of the stored values

    def settings(self, columns: slice, rows: slice) -> tuple[Any, ...]:
        """Return the arguments of the compiled loops for some columns and rows."""
        parts = (values[self.group[columns], rows].contiguous().numpy() for values in self[:3])
        return (*parts, lost_bits(self.dtype), None)


class TableLevels(NamedTuple):
    """The values that the weights of each row may take (out, k), ascending, rows in the order of the sweep."""

    values: Tensor  # float32, as they are stored

    def settings(self, columns: slice, rows: slice) -> tuple[Any, ...]:
        """Return the arguments of the compiled loops for some columns and rows."""
        return (None, None, None, None, self.values[rows].numpy())


class TwoSidedSweeps(Protocol):
    """Sweeps that round a weight and improve its codes; tensors are contiguous, float32 and transposed (in, out)."""

    def feed_back(self, work: Tensor, steps: GridLevels, columns: Tensor, rows: Tensor) -> Tensor:
        """Return the codes that error feedback finds for the weights `work`, which are overwritten.

        `columns` (in, in) and `rows` (out, out) are upper triangular with unit diagonal: the error e of weight (j, i)
        takes columns[j, k] · rows[i, l] · e from weight (k, l), k ≥ j, l ≥ i.
        """

    def descend(
        self, codes: Tensor, gradient: Tensor, steps: GridLevels, input_factor: Tensor, output_factor: Tensor
    ) -> None:
        """Change each of `codes`, column by column, where that lowers ½ tr(G d A dᵀ).

        `gradient` is A d G for the present difference d, and overwritten; `input_factor` is A (in, in), `output_factor`
        G (out, out).
        """


def feed_back(work: Tensor, steps: GridLevels | TableLevels, columns: Tensor, rows: Tensor) -> Tensor:
    """Implement `TwoSidedSweeps` on the CPU."""
    codes, (width, height) = torch.empty_like(work), work.shape
    for start in range(0, width, DESCENT_COLUMNS):
        stop = min(start + DESCENT_COLUMNS, width)
        within = columns[start:stop, start:stop].contiguous()
        spread = torch.zeros_like(work[start:stop])
        for top in range(0, height, TILE):
            end = min(top + TILE, height)
            tile = work[start:stop, top:end].clone(), torch.empty(stop - start, end - top)
            errors, given = torch.empty_like(tile[1]), spread[:, top:end].contiguous()
            between = rows[top:end, top:end].contiguous()
            settings = steps.settings(slice(start, stop), slice(top, end))
            arrays: list[Any] = [part.numpy() for part in (*tile, errors, given, within, between)]
            two_sided_blocks.feed_back(*arrays, *settings)
            codes[start:stop, top:end] = tile[1]
            spread[:, top:end] = given
            spread[:, end:].addmm_(errors, rows[top:end, end:])
        work[stop:].addmm_(columns[start:stop, stop:].T, spread, alpha=-1)
    return codes


def descend(
    codes: Tensor, gradient: Tensor, steps: GridLevels | TableLevels, input_factor: Tensor, output_factor: Tensor
) -> None:
    """Implement `TwoSidedSweeps` on the CPU."""
    width, height = codes.shape
    for start in range(0, width, DESCENT_COLUMNS):
        stop = min(start + DESCENT_COLUMNS, width)
        changes = torch.empty_like(codes[start:stop])
        within = input_factor[start:stop, start:stop].contiguous().numpy()
        block = codes[start:stop].numpy(), gradient[start:stop].numpy(), changes.numpy(), within, output_factor.numpy()
        two_sided_blocks.descend(*block, *steps.settings(slice(start, stop), slice(0, height)))
        gradient[stop:].addmm_(input_factor[start:stop, stop:].T, changes)
