"""Both sweeps of two-sided rounding over a whole weight: block by block, in the compiled loops."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hesse.compiled import Floats, lost_bits
from hesse.solvers import sweeps

BLOCK = 64  # columns whose errors reach those beyond them in one product
TILE = 64  # rows of a block that are gone through one by one; their errors reach the rows beyond them in one product


class Steps(NamedTuple):
    """The grid of a transposed weight (in, out), both sides in the order of the sweep; codes count from zero points."""

    scale: Tensor  # (groups, out) float32
    lowest: Tensor  # (groups, out) lowest codes, whole numbers in float32
    highest: Tensor  # (groups, out)
    group: Tensor  # (in,) the group of each column
    dtype: torch.dtype  # of the stored values


class TwoSidedSweeps(Protocol):
    """What rounds and betters the codes of a weight; all tensors are contiguous, float32 and transposed (in, out)."""

    def feed_back(self, work: Tensor, steps: Steps, columns: Tensor, rows: Tensor) -> Tensor:
        """The codes that error feedback finds for the weights `work`, which are used up.

        `columns` (in, in) and `rows` (out, out) are upper triangular with unit diagonal: the error e of weight (j, i)
        takes columns[j, k] · rows[i, l] · e from weight (k, l), k ≥ j, l ≥ i.
        """

    def descend(
        self, codes: Tensor, gradient: Tensor, steps: Steps, input_factor: Tensor, output_factor: Tensor
    ) -> None:
        """Change each of `codes`, column by column, where that lowers ½ tr(G d A dᵀ).

        `gradient` is A d G for the present difference d, and used up; `input_factor` is A (in, in), `output_factor` G
        (out, out).
        """


def feed_back(work: Tensor, steps: Steps, columns: Tensor, rows: Tensor) -> Tensor:
    """As `TwoSidedSweeps` says, on the CPU."""
    codes, height = torch.empty_like(work), work.shape[1]
    for start, stop, settings in _blocks(steps):
        within = columns[start:stop, start:stop].contiguous().numpy()
        spread = torch.zeros_like(work[start:stop])
        for top in range(0, height, TILE):
            end = min(top + TILE, height)
            tile = work[start:stop, top:end].numpy().copy(), np.empty_like(settings[0][:, top:end])
            errors, given = torch.empty(stop - start, end - top), spread[:, top:end].contiguous()
            scale, lowest, highest = (values[:, top:end].copy() for values in settings)
            between = rows[top:end, top:end].contiguous().numpy()
            sweeps.feed_back(
                *tile, errors.numpy(), given.numpy(), scale, lowest, highest, within, between, lost_bits(steps.dtype)
            )
            codes[start:stop, top:end] = torch.from_numpy(tile[1])
            spread[:, top:end] = given
            spread[:, end:].addmm_(errors, rows[top:end, end:])
        work[stop:].addmm_(columns[start:stop, stop:].T, spread, alpha=-1)
    return codes


def descend(codes: Tensor, gradient: Tensor, steps: Steps, input_factor: Tensor, output_factor: Tensor) -> None:
    """As `TwoSidedSweeps` says, on the CPU."""
    for start, stop, settings in _blocks(steps):
        changes = torch.empty_like(codes[start:stop])
        within = input_factor[start:stop, start:stop].contiguous().numpy()
        block = codes[start:stop].numpy(), gradient[start:stop].numpy(), changes.numpy()
        sweeps.descend(*block, *settings, within, output_factor.numpy(), lost_bits(steps.dtype))
        gradient[stop:].addmm_(input_factor[start:stop, stop:].T, changes)


def _blocks(steps: Steps) -> Iterator[tuple[int, int, tuple[Floats, Floats, Floats]]]:
    """Where each block of columns starts and stops; its scales, lowest and highest codes (columns, out)."""
    width = len(steps.group)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        scale, lowest, highest = (values[steps.group[start:stop]].numpy() for values in steps[:3])
        yield start, stop, (scale, lowest, highest)
