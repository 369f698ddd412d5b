"""Base of grids and tables: codes with one scale for every group of columns of a row."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, round_to
from hesse.errors import OptionError


@dataclass(frozen=True, eq=False)
class Scales:
    """One scale for each row and group of columns (out, groups), and a zero point where the grid is asymmetric."""

    scale: Tensor  # (out, groups), float32 holding values of the grid's dtype
    zero_point: Tensor | None  # (out, groups), whole numbers in float32

    @property
    def zeros(self) -> Tensor:
        """The zero points (out, groups), 0 where the grid is symmetric."""
        return torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point


@dataclass(frozen=True, eq=False)
class GridCode:
    """The stored form of a member; for a Grid, weight = (codes - zero_point) · scale."""

    codes: Tensor  # (out, in) int8 in [-2^(bits-1), 2^(bits-1) - 1]
    scales: Scales


class Grouped(Constraint):
    """Codes with one scale for every `group_size` columns of a row (-1: for the whole row).

    A last group may be narrower than the others.
    """

    def __post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise OptionError(
                f"group size is {self.group_size}; use a positive number such as 128, or -1 for one scale a row"
            )

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Columns of a row that share a scale; -1 for all."""

    @property
    @abstractmethod
    def symmetric(self) -> bool:
        """True if there are no zero points."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of a code."""

    rows_are_independent = True

    @abstractmethod
    def fit(self, weight: Tensor) -> Scales:
        """Return scales that span the range of each row and group of `weight` (out, in)."""

    @abstractmethod
    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the nearest codes as whole floating point numbers; all arguments broadcast."""

    @abstractmethod
    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the weights that `codes` stand for, rounded to the stored dtype as a loader rounds them."""

    def at(self, column: int) -> "Grouped":
        """Return the set of one column's weights, where columns differ; it fits, rounds and decodes the same."""
        return self

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The lowest and the highest code, if codes are whole steps from a zero point; None otherwise."""
        return None

    def group_width(self, columns: int) -> int:
        """Return how many columns share a scale in a weight with `columns` columns."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Return the number of scales in a row of `columns` columns."""
        return math.ceil(columns / self.group_width(columns))

    def by_group(self, weight: Tensor) -> Tensor:
        """Return `weight` (out, in) as (out, groups, width), a narrower last group padded with zeros."""
        rows, columns = weight.shape
        width = self.group_width(columns)
        missing = self.groups(columns) * width - columns
        return torch.nn.functional.pad(weight, (0, missing)).view(rows, -1, width)

    def ranges(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest weight of each row and group (out, groups), at most and at least 0."""
        padded = self.by_group(weight)  # whose zeros do not change the range, which includes 0
        return padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)

    def stored_scale(self, scale: Tensor) -> Tensor:
        """Return `scale` as stored; 1 for a group of zeros, or one so small that its scale underflows."""
        stored = round_to(scale, self.dtype)
        return torch.where(stored != 0, stored, torch.ones_like(stored))

    def expand(self, per_group: Tensor, columns: int) -> Tensor:
        """Return a value per group (out, groups) as a value per column (out, in)."""
        return per_group.repeat_interleave(self.group_width(columns), dim=1)[:, :columns]

    def expand_scales(self, scales: Scales, columns: int) -> Scales:
        """Return scales per group as scales per column (out, in)."""
        zero_point = None if scales.zero_point is None else self.expand(scales.zero_point, columns)
        return Scales(self.expand(scales.scale, columns), zero_point)

    def round(self, weight: Tensor, scales: Scales) -> GridCode:
        """Return the nearest codes of `weight` (out, in) for given scales."""
        each = self.expand_scales(scales, weight.shape[1])
        return GridCode(self.codes(weight, each.scale, each.zero_point).to(torch.int8), scales)

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> GridCode:
        # A weight's nearest code is the same in every diagonal metric.
        return self.round(weight, self.fit(weight))

    def decode(self, encoded: GridCode) -> Tensor:
        each = self.expand_scales(encoded.scales, encoded.codes.shape[1])
        return self.values(encoded.codes.to(each.scale.dtype), each.scale, each.zero_point)

    def bits_per_weight(self, shape: torch.Size) -> float:
        scale_bits = torch.finfo(self.dtype).bits + (0 if self.symmetric else self.code_bits)
        return self.code_bits + scale_bits * self.groups(shape[1]) / shape[1]
