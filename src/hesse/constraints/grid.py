"""S = integers times a scale: uniform quantisation, per row or per group of columns of a row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.base import round_to
from hesse.constraints.grouped import GridCode, Grouped, Scales
from hesse.errors import OptionError


@dataclass(frozen=True, eq=True)
class Grid(Grouped):
    """`bits`-bit integers with one scale for every `group_size` columns of a row (-1: for the whole row).

    Symmetric scales are max|w| / ((2^bits - 1 + headroom) / 2), asymmetric ones (max - min) / (2^bits - 1) over a range
    that includes 0. Without headroom the largest weight of a group lies half-way between two codes, where noise
    decides; more headroom makes all steps finer and clips the largest weights, for which error feedback compensates.
    With `signed` a symmetric scale is negative where a group's largest weight is positive, so that the code without a
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
        super().__post_init__()
        if not 0 <= self.headroom <= 2:
            raise OptionError(f"headroom is {self.headroom}, but must be between 0 and 2 steps")

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def bounds(self) -> tuple[int, int]:
        return self.lowest, self.highest

    @property
    def levels(self) -> float:
        """The number of steps in the range of a group."""
        return (1 << self.bits) - 1 + (self.headroom if self.symmetric else 0.0)

    def fit(self, weight: Tensor) -> Scales:
        return self._scales(*self.ranges(weight))

    def _scales(self, bottom: Tensor, top: Tensor) -> Scales:
        """Return scales of range [bottom, top], or ± the larger of the two where symmetric; 1 for an empty range."""
        extent = 2 * torch.maximum(top, -bottom) if self.symmetric else top - bottom
        if self.signed and self.symmetric:
            extent = torch.where(top > -bottom, -extent, extent)
        scale = self.stored_scale(extent / self.levels)
        if self.symmetric:
            return Scales(scale, None)
        return Scales(scale, (self.lowest - bottom / scale).round().clamp(self.lowest, self.highest))

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return nearest_whole(weight, scale, zero_point).clamp_(self.lowest, self.highest)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return round_to((codes if zero_point is None else codes - zero_point) * scale, self.dtype)

    def steps(self, code: GridCode, like: Tensor) -> Tensor:
        """Return codes relative to their zero points (out, in), in the type and on the device of `like`."""
        steps, zero_point = code.codes.to(like), code.scales.zero_point
        return steps if zero_point is None else steps - self.expand(zero_point.to(like), steps.shape[1])


def nearest_whole(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return the nearest codes of a grid without ends, in a tensor of their own."""
    codes = weight / scale
    if zero_point is not None:
        codes += zero_point
    return codes.round_()
