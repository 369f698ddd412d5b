"""S = grids whose groups of columns have one bit more or fewer than the mean, equally many of both."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, metric_or_ones
from hesse.constraints.grid import Grid, nearest_whole
from hesse.constraints.grouped import GridCode, Grouped, Scales
from hesse.errors import OptionError


@dataclass(frozen=True, eq=True)
class Signs(Grid):
    """A grid of one bit, ± half its scale, which is twice the mean |w| of a group: codes -1 and 0 from -½."""

    bits: int = 1

    def __post_init__(self) -> None:
        """Skip the checks: the only option is the group size, checked by the grid that this one belongs to."""

    def fit(self, weight: Tensor) -> Scales:
        columns = weight.shape[1]
        width, groups = self.group_width(columns), self.groups(columns)
        sizes = torch.full((groups,), width, device=weight.device)
        sizes[-1] = columns - (groups - 1) * width
        scale = self.stored_scale(2 * self.by_group(weight.abs()).sum(-1) / sizes)
        return Scales(scale, torch.full_like(scale, -0.5))


@dataclass(frozen=True, eq=True)
class GroupBits(Grouped):
    """`base` with `bits` bits in each group of columns, the same in all rows; 1 bit is a sign."""

    base: Grid = field(default_factory=Grid)
    bits: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        return self.base.group_size

    @property
    def symmetric(self) -> bool:
        return self.base.symmetric and 1 not in self.bits

    @property
    def code_bits(self) -> int:
        return max(self.bits)

    def grid(self, bits: int) -> Grid:
        """Return the grid of the groups with `bits` bits."""
        if bits == 1:
            return Signs(group_size=self.group_size, dtype=self.base.dtype)
        return replace(self.base, bits=bits)

    def at(self, column: int) -> Grid:
        width = self.base.group_size
        return self.grid(self.bits[0 if width == -1 else column // width])

    def fit(self, weight: Tensor) -> Scales:
        each = {bits: self.grid(bits).fit(weight) for bits in set(self.bits)}
        scale = torch.stack([each[bits].scale[:, group] for group, bits in enumerate(self.bits)], 1)
        zeros = [each[bits].zero_point for bits in self.bits]
        if all(zero is None for zero in zeros):
            return Scales(scale, None)
        found = [torch.zeros_like(scale[:, 0]) if zero is None else zero[:, g] for g, zero in enumerate(zeros)]
        return Scales(scale, torch.stack(found, 1))

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return the codes of whole rows (out, in); for single columns use `at`."""
        levels = torch.tensor([[1 << (bits - 1) for bits in self.bits]]).to(weight)
        highest = self.expand(levels, weight.shape[1]) - 1
        return nearest_whole(weight, scale, zero_point).clamp_(-highest - 1, highest)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.base.values(codes, scale, zero_point)


@dataclass(frozen=True, eq=False)
class MixedCode:
    """Codes, and the number of bits of each group of columns."""

    code: GridCode
    bits: Tensor  # (groups,) uint8


@dataclass(frozen=True, eq=True)
class MixedGrid(Constraint):
    """`base`, but k groups of columns with one bit fewer and k with one more; a narrower last group keeps its own.

    The groups are the k that matter least and the k that matter most; k = 0 is `base` itself. Source: SliM-LLM (Huang
    et al., 2024), whose groups of one bit are signs too.
    """

    base: Grid = field(default_factory=Grid)

    def __post_init__(self) -> None:
        if not 2 <= self.base.bits <= 7:
            raise OptionError(f"bits is {self.base.bits}, but groups of mixed bits have a mean of 2 to 7")

    def choices(self, salience: Tensor) -> Iterator[GroupBits]:
        """Yield the base's own bits, then those for k = 1, 2, ...; `salience` (in,) is each column's importance."""
        columns = len(salience)
        width, groups = self.base.group_width(columns), self.base.groups(columns)
        whole = columns // width
        order = torch.argsort(salience[: whole * width].view(whole, width).sum(1), stable=True).tolist()
        bits = [self.base.bits] * groups
        yield self.with_bits(bits)
        for k in range(whole // 2):
            bits[order[k]] -= 1
            bits[order[-1 - k]] += 1
            yield self.with_bits(bits)

    def with_bits(self, bits: list[int]) -> GroupBits:
        """Return the grid with the given bits in each group."""
        return GroupBits(self.base, tuple(bits), dtype=self.dtype)

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> MixedCode:
        inside = metric_or_ones(weight, metric)
        choices = self.choices((inside * weight.square()).sum(0))
        codes = (self.code(grid.encode(weight), grid) for grid in choices)
        return min(codes, key=lambda code: self.distance(weight, code, inside))

    def code(self, code: GridCode, grid: GroupBits) -> MixedCode:
        """Return the stored form of codes on one of the choices."""
        return MixedCode(code, torch.tensor(grid.bits, dtype=torch.uint8, device=code.codes.device))

    def decode(self, encoded: MixedCode) -> Tensor:
        return self.with_bits(encoded.bits.tolist()).decode(encoded.code)

    def bits_per_weight(self, shape: torch.Size) -> float:
        """Return the bits of the base, whose mean stays, plus two bits per group of columns for its number of bits."""
        return self.base.bits_per_weight(shape) + 2 * self.base.groups(shape[1]) / shape.numel()
