"""OneBit: matrices of signs with a number for each row and each column, trained from their best fit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.sign_rank_one import rank_one
from hesse.training.held import Lasting, straight_through


@dataclass(frozen=True)
class OneBit(Lasting):
    """sign(w) ⊙ (a bᵀ): w is trained by straight-through gradients, a (out,) and b (in,) by exact ones; a Held.

    They begin at the weight and its fit as a SignRankOne: before any training the layer is what the method `onebit`
    makes of it, with numbers in the model's precision. A kernel is the matrix (out, in · kernel). Source: Xu et al.,
    2024, arXiv:2402.11295.
    """

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        matrix = weight.flatten(1)
        return weight, *rank_one(matrix.abs(), torch.ones_like(matrix))

    def weight(self, *free: Tensor) -> Tensor:
        weight, rows, columns = free
        signs = torch.where(weight.detach() >= 0, 1.0, -1.0).to(weight)
        return straight_through(signs, weight).flatten(1) * torch.outer(rows, columns)


@dataclass(frozen=True, eq=False)
class HeldSigns(Lasting):
    """As OneBit with signs that stay: only a and b are trained, two vectors a layer, by their exact gradient."""

    positive: Tensor  # (out, in), where the weight is not negative

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        matrix = weight.flatten(1)
        return rank_one(matrix.abs(), torch.ones_like(matrix))

    def weight(self, *free: Tensor) -> Tensor:
        rows, columns = free
        size = torch.outer(rows, columns)
        return torch.where(self.positive.to(size.device), size, -size)
