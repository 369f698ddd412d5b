"""S = members of another set whose columns were divided by a scale each: a grid on W diag(s)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, round_to
from hesse.constraints.grid import Grid


@dataclass(frozen=True, eq=False)
class ScaledCode:
    """weight = base member / scale."""

    base: Any
    scale: Tensor  # s (in,) > 0, of the constraint's dtype held in float32


@dataclass(frozen=True, eq=True)
class ScaledColumns(Constraint):
    """`base` on W diag(s), with one s per input; the member is divided by s again.

    Stored by itself, s takes one number per input more than `base`; none where the layer before can absorb it.
    """

    base: Constraint = field(default_factory=Grid)

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> ScaledCode:
        """Return the nearest member with every s = 1."""
        return self.encode_scaled(weight, torch.ones_like(weight[0]), metric)

    def encode_scaled(self, weight: Tensor, scale: Tensor, metric: Tensor | None = None) -> ScaledCode:
        """Return the nearest member for a given s (in,), under `metric` of the weight itself."""
        stored = round_to(scale, self.dtype)
        inside = None if metric is None else metric / stored.square()
        return ScaledCode(self.base.encode(weight * stored, inside), stored)

    def decode(self, encoded: ScaledCode) -> Tensor:
        return round_to(self.base.decode(encoded.base) / encoded.scale, self.dtype)

    def bits_per_weight(self, shape: torch.Size) -> float:
        return self.base.bits_per_weight(shape) + torch.finfo(self.dtype).bits / shape[0]
