"""The protocol of a constraint: a set S of allowed weight matrices, and how a member is stored."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True, eq=True)
class Constraint(ABC):
    """A set of weight matrices (out, in), with a stored form (`encode`) that `decode` turns back exactly.

    `dtype` is the type that scales and unrounded values are stored in, so that a member decodes to exactly the numbers
    that a loader will see.
    """

    bytes_per_weight: ClassVar[int] = 28  # while encoding and decoding: seven float32 matrices of the weight's size

    dtype: torch.dtype = field(default=torch.float32, kw_only=True)

    @property
    def rows_are_independent(self) -> bool:
        """True if each row of a member can be chosen without the others; False unless a set says so."""
        return False

    @abstractmethod
    def encode(self, weight: Tensor, metric: Tensor | None = None) -> Any:
        """Return the stored form of the nearest member in Σ metric · difference²; `metric` broadcasts to (out, in)."""

    @abstractmethod
    def decode(self, encoded: Any) -> Tensor:
        """Return the weight (out, in) of a stored form, in float32 or wider."""

    @abstractmethod
    def bits_per_weight(self, shape: torch.Size) -> float:
        """Return the bits per weight of a member of `shape` (out, in), scales, zero points and masks included."""

    def check(self, shape: torch.Size) -> None:
        """Raise OptionError if a weight of `shape` (out, in) cannot be constrained in this way, nor by its parts."""
        for part in self.parts.values():
            part.check(shape)

    def workspace(self, shape: torch.Size) -> int:
        """Return the bytes that encoding and decoding a float32 weight of `shape` (out, in) hold at most."""
        return self.bytes_per_weight * shape.numel()

    @property
    def parts(self) -> dict[str, "Constraint"]:
        """The sets that this one is made of, by the name of the field."""
        values = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in values if isinstance(value, Constraint)}

    @property
    def together(self) -> int:
        """The number of neighboring rows or columns chosen together, of which a matrix must have a multiple."""
        return 1

    if TYPE_CHECKING:  # plus.py, which knows what a sum is, sets it

        def __add__(self, other: "Constraint") -> "Constraint":
            """Return the sums of a member of this set and a member of another."""

    def nearest(self, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the member that `encode` stores, as a weight (out, in)."""
        return self.decode(self.encode(weight, metric)).to(weight.dtype)

    def residual(self, weight: Tensor, encoded: Any) -> Tensor:
        """Return `weight` (out, in) minus the stored member."""
        return weight - self.decode(encoded).to(weight.dtype)

    def distance(self, weight: Tensor, encoded: Any, metric: Tensor) -> float:
        """Return Σ metric · difference² of `weight` (out, in) and a stored member."""
        return float((metric * self.residual(weight, encoded).square()).sum())

    def stored_as(self, dtype: torch.dtype) -> Self:
        """Return the same set with scales and values, also of the sets it is made of, stored in `dtype`."""
        parts: dict[str, Any] = {name: part.stored_as(dtype) for name, part in self.parts.items()}
        return replace(self, **parts, dtype=dtype)


def metric_or_ones(weight: Tensor, metric: Tensor | None) -> Tensor:
    """Return `metric`, which broadcasts to `weight` (out, in), expanded to its shape; ones without a metric."""
    return torch.ones_like(weight) if metric is None else metric.to(weight).expand(weight.shape)


def round_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `value` rounded to `dtype`, in float32 or wider."""
    return value.to(dtype).to(torch.promote_types(value.dtype, torch.float32))
