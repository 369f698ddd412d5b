"""S = values of a table times a power of two a group: the microscaling formats, MXFP4 above all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.base import round_to
from hesse.constraints.grouped import Scales
from hesse.constraints.table import TABLES, Table

EXPONENT_BITS = 8
SMALLEST = -24  # the exponent of float16's smallest number, so that every stored type holds the scales exactly


@dataclass(frozen=True, eq=True)
class Microscaled(Table):
    """The values of a named table, times a power of two for every `group_size` columns.

    A group takes the better of two powers of two in squared error: the smaller clips the group's largest weights, the
    larger does not.

    Source: OCP Microscaling Formats, version 1.0 (2023), which always takes the smaller or equal power.
    """

    name: str = "fp4"
    group_size: int = 32

    def fit(self, weight: Tensor) -> Scales:
        bottom, top = self.ranges(weight)
        largest = torch.maximum(top, -bottom)
        whole = torch.where(largest > 0, largest / TABLES[self.name][-1], torch.ones_like(largest))
        exponent = whole.log2().ceil().clamp(min=SMALLEST)
        larger, smaller = (
            round_to(torch.exp2(power), self.dtype) for power in (exponent, (exponent - 1).clamp(SMALLEST))
        )
        return Scales(torch.where(self._errors(weight, smaller) < self._errors(weight, larger), smaller, larger), None)

    def _errors(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the squared error (out, groups) of the nearest codes for given scales."""
        each = self.expand(scale, weight.shape[1])
        return self.by_group((self.values(self.codes(weight, each, None), each, None) - weight).square()).sum(-1)

    def bits_per_weight(self, shape: torch.Size) -> float:
        return self.code_bits + EXPONENT_BITS * self.groups(shape[1]) / shape[1]
