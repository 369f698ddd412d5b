"""S = matrices of a given rank, stored as two thin factors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, round_to
from hesse.errors import OptionError, UnsupportedProduct


@dataclass(frozen=True, eq=False)
class LowRankCode:
    """weight = left @ right."""

    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)


@dataclass(frozen=True, eq=True)
class LowRank(Constraint):
    """Matrices (out, in) of rank at most `rank`."""

    rank: int = 64

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"rank is {self.rank}, but must be at least 1")

    bytes_per_weight = 17  # its factors of all ranks, and the weight that they give

    def check(self, shape: torch.Size) -> None:
        if self.rank >= min(shape):
            raise OptionError(
                f"rank {self.rank} is not below the smaller side of a weight {shape[0]} x {shape[1]}: "
                f"use at most {min(shape) - 1}, or ignore the layer"
            )

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> LowRankCode:
        """Return the nearest member, by `factors_of`."""
        if metric is not None:
            raise UnsupportedProduct("LowRank has no weighted nearest member; use WhitenedSVD with a Gram")
        return self.encode_factors(*factors_of(weight, self.rank))

    def encode_factors(self, left: Tensor, right: Tensor) -> LowRankCode:
        """Return the stored form of left (out, rank) @ right (rank, in)."""
        return LowRankCode(round_to(left, self.dtype), round_to(right, self.dtype))

    def decode(self, encoded: LowRankCode) -> Tensor:
        return encoded.left @ encoded.right

    def bits_per_weight(self, shape: torch.Size) -> float:
        return torch.finfo(self.dtype).bits * self.rank * (shape[0] + shape[1]) / shape.numel()


def factors_of(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the left (out, rank) and right (rank, in) whose product is nearest to a matrix (out, in).

    Truncated SVD (Eckart and Young, 1936), the singular values shared evenly between the factors.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
