"""OneBit: train matrices of signs with one scale per row and per column, from their best fit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.sign_rank_one import rank_one
from hesse.training.held import Lasting, straight_through


@dataclass(frozen=True)
class OneBit(Lasting):
    """Parametrization sign(w) ⊙ (a bᵀ): straight-through gradients for w, exact ones for a (out,) and b (in,).

    The initial values are the weight and its fit as a SignRankOne: before training the layer equals the result of the
    method `onebit`, with scales in the model's precision. A kernel is the matrix (out, in · kernel). Source: Xu et al.,
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
    """OneBit with fixed signs: only the two vectors a and b of each layer are trained, by their exact gradient."""

    positive: Tensor  # (out, in), True where the weight is not negative

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        matrix = weight.flatten(1)
        return rank_one(matrix.abs(), torch.ones_like(matrix))

    def weight(self, *free: Tensor) -> Tensor:
        rows, columns = free
        size = torch.outer(rows, columns)
        return torch.where(self.positive.to(size.device), size, -size)
