"""S = integers times a scale: uniform quantisation, per row or per group of columns of a row."""

import math
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


@dataclass(frozen=True, eq=False)
class GridCode:
    """A member of a Grid as it is stored: weight = (codes - zero_point) · scale."""

    codes: Tensor  # (out, in) int8 in [-2^(bits-1), 2^(bits-1) - 1]
    scales: Scales


@dataclass(frozen=True, eq=True)
class Grid(Constraint):
    """`bits`-bit integers with one scale for every `group_size` columns of a row (-1: for the whole row).

    Symmetric scales are max|w| / ((2^bits - 1 + headroom) / 2), asymmetric ones (max - min) / (2^bits - 1) over a range
    that includes 0. Without headroom the largest weight of a group lies half-way between two codes, where noise
    decides; more of it makes all steps finer and clips the largest weights, which error feedback can make good. With
    `signed` a symmetric scale is negative where a group's largest weight is positive, so that the code without a
    counterpart, -2^(bits-1), serves the longer side. Scales are rounded to `dtype` before codes are chosen. A last
    group may be narrower than the others.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    headroom: float = 0.0
    signed: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise OptionError(f"bits is {self.bits}, but a Grid has 2 to 8")
        if self.group_size < 1 and self.group_size != -1:
            raise OptionError(
                f"group size is {self.group_size}; use a positive number such as 128, or -1 for one scale a row"
            )
        if not 0 <= self.headroom <= 2:
            raise OptionError(f"headroom is {self.headroom}, but must be between 0 and 2 steps")

    @property
    def rows_are_independent(self) -> bool:
        return True

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> float:
        """Steps that the range of a group is cut into."""
        return (1 << self.bits) - 1 + (self.headroom if self.symmetric else 0.0)

    def check(self, shape: torch.Size) -> None:
        """Every matrix can be put on a grid."""

    def group_width(self, columns: int) -> int:
        """Columns that share a scale, in a weight with `columns` columns."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Scales in a row of `columns` columns."""
        return math.ceil(columns / self.group_width(columns))

    def fit(self, weight: Tensor) -> Scales:
        """Scales that span the range of each row and group of `weight` (out, in)."""
        rows, columns = weight.shape
        width = self.group_width(columns)
        # Padding by zeros does not change the range, which includes 0.
        padded = torch.nn.functional.pad(weight, (0, self.groups(columns) * width - columns)).view(rows, -1, width)
        return self._scales(padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0))

    def _scales(self, bottom: Tensor, top: Tensor) -> Scales:
        """Scales whose range is [bottom, top], or ± the larger of the two where symmetric; 1 for an empty range."""
        extent = 2 * torch.maximum(top, -bottom) if self.symmetric else top - bottom
        if self.signed and self.symmetric:
            extent = torch.where(top > -bottom, -extent, extent)
        scale = round_to(extent / self.levels, self.dtype)
        # A group of zeros, or one so small that its scale underflows, is stored as zeros of scale 1.
        scale = torch.where(scale != 0, scale, torch.ones_like(scale))
        if self.symmetric:
            return Scales(scale, None)
        return Scales(scale, (self.lowest - bottom / scale).round().clamp(self.lowest, self.highest))

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Nearest codes as whole floating point numbers; all arguments broadcast."""
        codes = weight / scale
        if zero_point is not None:
            codes += zero_point
        return codes.round_().clamp_(self.lowest, self.highest)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The weights that `codes` stand for, rounded to the stored dtype as a loader rounds them."""
        return round_to((codes if zero_point is None else codes - zero_point) * scale, self.dtype)

    def expand(self, per_group: Tensor, columns: int) -> Tensor:
        """A value per group (out, groups) as a value per column (out, in)."""
        return per_group.repeat_interleave(self.group_width(columns), dim=1)[:, :columns]

    def round(self, weight: Tensor, scales: Scales) -> GridCode:
        """Nearest codes of `weight` (out, in) for given scales."""
        columns = weight.shape[1]
        zero_point = None if scales.zero_point is None else self.expand(scales.zero_point, columns)
        codes = self.codes(weight, self.expand(scales.scale, columns), zero_point)
        return GridCode(codes.to(torch.int8), scales)

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> GridCode:
        # A weight's nearest code is the same in every diagonal metric.
        return self.round(weight, self.fit(weight))

    def decode(self, encoded: GridCode) -> Tensor:
        columns = encoded.codes.shape[1]
        scales = encoded.scales
        zero_point = None if scales.zero_point is None else self.expand(scales.zero_point, columns)
        return self.values(encoded.codes.to(scales.scale.dtype), self.expand(scales.scale, columns), zero_point)

    def bits_per_weight(self, shape: torch.Size) -> float:
        scale_bits = torch.finfo(self.dtype).bits + (0 if self.symmetric else self.bits)
        return self.bits + scale_bits * self.groups(shape[1]) / shape[1]
