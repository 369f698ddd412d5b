"""S = a grid whose groups lie along a row, or along a column: one scale for neighbouring inputs, or for outputs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, metric_or_ones
from hesse.constraints.grid import Grid
from hesse.constraints.grouped import GridCode, Grouped, Scales


@dataclass(frozen=True, eq=True)
class AlongOutputs(Grouped):
    """`base` with a scale for every `group_size` rows of a column in place of columns of a row.

    An outlier among the inputs widens the range of its own groups only. Scales are held per weight (out, in), and
    stored per group.
    """

    base: Grid = field(default_factory=Grid)

    @property
    def group_size(self) -> int:
        return 1

    @property
    def symmetric(self) -> bool:
        return self.base.symmetric

    @property
    def code_bits(self) -> int:
        return self.base.code_bits

    @property
    def bounds(self) -> tuple[int, int]:
        return self.base.bounds

    rows_are_independent = False

    def fit(self, weight: Tensor) -> Scales:
        each = self.base.expand_scales(self.base.fit(weight.T), len(weight))
        return Scales(each.scale.T, None if each.zero_point is None else each.zero_point.T)

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.base.codes(weight, scale, zero_point)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.base.values(codes, scale, zero_point)

    def bits_per_weight(self, shape: torch.Size) -> float:
        return self.base.bits_per_weight(torch.Size([shape[1], shape[0]]))


@dataclass(frozen=True, eq=False)
class SideCode:
    """A member, and the side that its groups lie along."""

    code: GridCode
    along_outputs: bool


@dataclass(frozen=True, eq=True)
class EitherSide(Constraint):
    """`base`, or `AlongOutputs(base)`: for each layer the nearer one. Source: AdaDim (Heo et al., 2023)."""

    base: Grid = field(default_factory=Grid)

    def side(self, along_outputs: bool) -> Grouped:
        """Return the grid with its groups along rows, or along columns."""
        return AlongOutputs(self.base, dtype=self.dtype) if along_outputs else self.base

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> SideCode:
        found = [SideCode(self.side(along).encode(weight), along) for along in (False, True)]
        inside = metric_or_ones(weight, metric)
        return min(found, key=lambda code: self.distance(weight, code, inside))

    def decode(self, encoded: SideCode) -> Tensor:
        return self.side(encoded.along_outputs).decode(encoded.code)

    def bits_per_weight(self, shape: torch.Size) -> float:
        """Return the bits of the larger side, where groups do not divide both equally, plus one bit for the choice."""
        return max(self.side(along).bits_per_weight(shape) for along in (False, True)) + 1 / shape.numel()
