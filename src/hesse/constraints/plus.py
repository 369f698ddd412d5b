"""S = A + B: sums of a member of one set and a member of another, such as a grid and a low rank."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, metric_or_ones
from hesse.constraints.sparse import Sparse
from hesse.errors import OptionError

ROUNDS = 2  # of fitting the base to the other weights and choosing the exact ones anew


@dataclass(frozen=True, eq=False)
class PlusCode:
    """A member of a Plus: the stored forms of both summands."""

    base: Any
    correction: Any


@dataclass(frozen=True, eq=True)
class Plus(Constraint):
    """Sum of two sets, written `Grid(4, 128) + LowRank(16)`: codes, and a correction that is added after decoding.

    With a Sparse as the correction (`Codebook(3) + Sparse(0.995)`) its few weights are exact, whatever the base holds
    there: the nearest member excludes them from the base.
    """

    base: Constraint
    correction: Constraint

    def __post_init__(self) -> None:
        if isinstance(self.base, Plus) or isinstance(self.correction, Plus):
            raise OptionError("a sum has two parts: a base and one correction")

    @property
    def rows_are_independent(self) -> bool:
        return self.base.rows_are_independent and self.correction.rows_are_independent

    @property
    def together(self) -> int:
        return math.lcm(self.base.together, self.correction.together)

    def workspace(self, shape: torch.Size) -> int:
        both = self.base.workspace(shape), self.correction.workspace(shape)
        return (sum(both) if isinstance(self.correction, Sparse) else max(both)) + 4 * shape.numel()

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> PlusCode:
        """Return the nearest member of the base, and the nearest member of the correction to the residual.

        The weights that a Sparse keeps are chosen first by their size, with the metric and without it, and by the
        base's residual; then again by the residual of the base fitted to the other weights. The best of all is
        returned.
        """
        if not isinstance(self.correction, Sparse):
            return self._onto(weight, metric, weight, metric)
        inside = metric_or_ones(weight, metric)
        found = [self._onto(weight, metric, weight, metric)]
        starts = [self.correction.encode(weight, metric).mask, self.correction.encode(weight).mask]
        for exact in [*starts, found[0].correction.mask]:
            for _ in range(ROUNDS):
                # An exact weight has no weight in the base, and a value there that disturbs no range.
                found.append(self._onto(weight, metric, torch.where(exact, 0.0, weight), inside * ~exact))
                exact = found[-1].correction.mask
        return min(found, key=lambda code: self.distance(weight, code, inside))

    def _onto(self, weight: Tensor, metric: Tensor | None, seen: Tensor, seen_metric: Tensor | None) -> PlusCode:
        """Return the base's nearest member to `seen`, and the correction's to the residual of `weight`."""
        base = self.base.encode(seen, seen_metric)
        return PlusCode(base, self.correction.encode(self.base.residual(weight, base), metric))

    def decode(self, encoded: PlusCode) -> Tensor:
        return self.base.decode(encoded.base) + self.correction.decode(encoded.correction)

    def bits_per_weight(self, shape: torch.Size) -> float:
        return self.base.bits_per_weight(shape) + self.correction.bits_per_weight(shape)


def _add(self: Constraint, other: Constraint) -> Plus:
    """Return the sums of a member of one set and a member of another."""
    return Plus(self, other, dtype=self.dtype)


Constraint.__add__ = _add  # type: ignore[method-assign]  # a set need not know of sums
