"""S = a few columns on a grid, all others signs times an outer product: less than two bits a weight."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hesse.constraints.base import Constraint
from hesse.constraints.grid import Grid
from hesse.constraints.grouped import GridCode
from hesse.constraints.sign_rank_one import SignRankOne, SignRankOneCode
from hesse.errors import OptionError


@dataclass(frozen=True, eq=False)
class SalientCode:
    """The columns where `salient` (in,) is true as `grid`, the others as `rest`."""

    salient: Tensor
    grid: GridCode
    rest: SignRankOneCode


@dataclass(frozen=True, eq=True)
class SalientColumns(Constraint):
    """The `share` of columns of the largest metric on `grid`, the others as SignRankOne; a bit per column says which.

    With the diagonal of a Gram as the metric they are the inputs of the largest E[x²]; without one, the columns of the
    largest weights. Source: PTQ1.61 (Zhao et al., 2025, arXiv:2502.13179), without its preprocessing of weights.
    """

    share: float = 0.2
    grid: Grid = field(default_factory=lambda: Grid(4, -1, headroom=0.06))

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise OptionError(f"the share of salient columns is {self.share}, but must be between 0 and 1, such as 0.2")
        if not self.grid.symmetric:
            raise OptionError("the grid of salient columns is asymmetric, but its scales are refitted: use symmetric")

    def count(self, columns: int) -> int:
        """Return how many of `columns` columns are salient."""
        return round(self.share * columns)

    bytes_per_weight = 18  # four matrices of its size, and signs

    def check(self, shape: torch.Size) -> None:
        if not 0 < self.count(shape[1]) < shape[1]:
            raise OptionError(
                f"{self.share:.0%} of {shape[1]} columns rounds to none or all of them: leave the layer out with "
                "--ignore, or choose another share"
            )

    @property
    def rest(self) -> SignRankOne:
        """The set of the other columns."""
        return SignRankOne(dtype=self.dtype)

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> SalientCode:
        of_columns = weight.square().sum(0) if metric is None else metric.expand_as(weight).sum(0)
        salient = torch.zeros_like(of_columns, dtype=torch.bool)
        salient[of_columns.topk(self.count(weight.shape[1])).indices] = True
        others = None if metric is None else metric.expand_as(weight)[:, ~salient]
        return SalientCode(salient, self.grid.encode(weight[:, salient]), self.rest.encode(weight[:, ~salient], others))

    def decode(self, encoded: SalientCode) -> Tensor:
        grid, rest = self.grid.decode(encoded.grid), self.rest.decode(encoded.rest)
        member = grid.new_empty(len(grid), len(encoded.salient))
        member[:, encoded.salient] = grid
        member[:, ~encoded.salient] = rest
        return member

    def bits_per_weight(self, shape: torch.Size) -> float:
        salient = self.count(shape[1])
        kept, others = torch.Size((shape[0], salient)), torch.Size((shape[0], shape[1] - salient))
        both = self.grid.bits_per_weight(kept) * salient + self.rest.bits_per_weight(others) * others[1]
        return both / shape[1] + 1 / shape[0]
