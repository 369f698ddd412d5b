"""The protocol of a constraint: a set S of allowed weight matrices, and how a member is stored."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True, eq=True)
class Constraint(ABC):
    """A set of weight matrices (out, in), with a stored form (`encode`) that `decode` turns back exactly.

    `dtype` is what scales and unrounded values are stored in, so that a member decodes to the very numbers that a
    loader will see.
    """

    dtype: torch.dtype = field(default=torch.float32, kw_only=True)

    @property
    @abstractmethod
    def rows_are_independent(self) -> bool:
        """Whether each row of a member may be chosen without looking at the others."""

    @abstractmethod
    def encode(self, weight: Tensor, metric: Tensor | None = None) -> Any:
        """The stored form of the nearest member found in Σ metric · difference²; `metric` broadcasts to (out, in)."""

    @abstractmethod
    def decode(self, encoded: Any) -> Tensor:
        """The weight (out, in) of a stored form, in float32 or wider."""

    @abstractmethod
    def bits_per_weight(self, shape: torch.Size) -> float:
        """Bits to store a member of `shape` (out, in), scales, zero points and masks included, per weight."""

    @abstractmethod
    def check(self, shape: torch.Size) -> None:
        """Raise OptionError if a weight of `shape` (out, in) cannot be constrained in this way."""

    def workspace(self, shape: torch.Size) -> int:
        """Return the bytes that encoding and decoding a float32 weight of `shape` (out, in) hold at most."""
        return 28 * shape.numel()  # seven matrices of its size

    @property
    def together(self) -> int:
        """Of how many neighbouring rows or columns a matrix must have a multiple, since they are chosen together."""
        return 1

    if TYPE_CHECKING:  # plus.py, which knows what a sum is, sets it

        def __add__(self, other: "Constraint") -> "Constraint":
            """Return the sums of a member of this set and a member of another."""

    def nearest(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """The member that `encode` stores, as a weight (out, in)."""
        return self.decode(self.encode(weight, metric)).to(weight.dtype)

    def residual(self, weight: Tensor, encoded: Any) -> Tensor:
        """What a stored member leaves of `weight` (out, in)."""
        return weight - self.decode(encoded).to(weight.dtype)

    def distance(self, weight: Tensor, encoded: Any, metric: Tensor) -> float:
        """Σ metric · difference² of `weight` (out, in) and a stored member."""
        return float((metric * self.residual(weight, encoded).square()).sum())

    def stored_as(self, dtype: torch.dtype) -> Self:
        """The same set, made of the same sets, with scales and values stored in `dtype`."""
        parts = ((each.name, getattr(self, each.name)) for each in fields(self))
        sets: dict[str, Any] = {name: part.stored_as(dtype) for name, part in parts if isinstance(part, Constraint)}
        return replace(self, **sets, dtype=dtype)


def metric_or_ones(weight: Tensor, metric: Tensor | None) -> Tensor:
    """What `metric`, which broadcasts to `weight` (out, in), makes each weight weigh: 1 without one."""
    return torch.ones_like(weight) if metric is None else metric.to(weight).expand(weight.shape)


def round_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to `dtype` and back, in float32 or wider."""
    return value.to(dtype).to(torch.promote_types(value.dtype, torch.float32))
