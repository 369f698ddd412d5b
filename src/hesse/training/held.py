"""Parametrizations of weights that keep a constraint during training: zeros, codes, signs, membership of a set."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hesse.constraints import Constraint, Grid
from hesse.constraints.grouped import GridCode, Scales
from hesse.constraints.sign_rank_one import rank_one
from hesse.errors import OptionError


class Held(ABC):
    """Parametrization of a weight by trained tensors, so that every step ends in an allowed weight."""

    @abstractmethod
    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the initial values of the tensors that are trained in place of `weight`.

        Raises:
            OptionError: the parametrization does not support a weight of that shape.
        """

    @abstractmethod
    def weight(self, *free: Tensor) -> Tensor:
        """Return the allowed weight; its gradient in `free` is exact, or an estimate that the class documents."""

    def at(self, step: int) -> Self:
        """Return the parametrization for a step of the training; itself, unless it changes over time."""
        return self


@dataclass(frozen=True, eq=False)
class HeldZeros(Held):
    """Parametrization that keeps zeros, unstructured or N:M, with the exact gradient."""

    kept: Tensor  # in the weight's shape, True where the weight is not fixed at zero

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        if weight.shape != self.kept.shape:
            raise OptionError(f"a mask {tuple(self.kept.shape)} does not fit a weight {tuple(weight.shape)}")
        return (weight,)

    def weight(self, *free: Tensor) -> Tensor:
        (weight,) = free
        return torch.where(self.kept.to(weight.device), weight, 0.0)


@dataclass(frozen=True, eq=False)
class HeldCodes(Held):
    """Parametrization that keeps the codes of a Grid and trains a factor of each scale, which starts at 1.

    weight = factor · scale · (code - zero point) is smooth, so the gradient is exact, not a straight-through estimate,
    and an optimiser's step is relative to each scale. Scales are trained in the model's precision and not rounded to
    the grid's. Source: PEQA (Kim et al., 2023, arXiv:2305.14152).
    """

    grid: Grid
    code: GridCode

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        if weight.flatten(1).shape != self.code.codes.shape:
            raise OptionError(f"codes {tuple(self.code.codes.shape)} do not fit a weight {tuple(weight.shape)}")
        return (weight.new_ones(self.code.scales.scale.shape),)

    def weight(self, *free: Tensor) -> Tensor:
        (factor,) = free
        steps = self.grid.steps(self.code, factor)
        return self.grid.expand(factor * self.code.scales.scale.to(factor), steps.shape[1]) * steps

    def trained(self, factor: Tensor) -> GridCode:
        """Return the code for trained factors (out, groups)."""
        scales = Scales(self.grid.stored_scale(factor * self.code.scales.scale), self.code.scales.zero_point)
        return GridCode(self.code.codes, scales)


@dataclass(frozen=True, eq=False)
class StraightThrough(Held):
    """Parametrization by a free weight that is rounded to the nearest member of a constraint, with a copied gradient.

    The free weight moves between members, so codes and zeros can change, at the price of a biased gradient.
    Source: Bengio et al., 2013, arXiv:1308.3432; of masks, Zhou et al., 2021 (arXiv:2102.04010).
    """

    constraint: Constraint

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        self.constraint.check(weight.flatten(1).shape)
        return (weight,)

    def weight(self, *free: Tensor) -> Tensor:
        (weight,) = free
        nearest = self.constraint.nearest(weight.detach().flatten(1)).view(weight.shape)
        return straight_through(nearest, weight)


@dataclass(frozen=True)
class OneBit(Held):
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
class HeldSigns(Held):
    """OneBit with fixed signs: only the two vectors a and b of each layer are trained, by their exact gradient."""

    positive: Tensor  # (out, in), True where the weight is not negative

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        matrix = weight.flatten(1)
        return rank_one(matrix.abs(), torch.ones_like(matrix))

    def weight(self, *free: Tensor) -> Tensor:
        rows, columns = free
        size = torch.outer(rows, columns)
        return torch.where(self.positive.to(size.device), size, -size)


def straight_through(value: Tensor, free: Tensor) -> Tensor:
    """Return `value`, with the gradient passed to `free`, which has the same shape."""
    return value + (free - free.detach())


def held_zeros(model: nn.Module) -> dict[str, Held]:
    """Return parametrizations that keep the zeros of a pruned model's matrices and kernels, by name."""
    return {
        name: HeldZeros(parameter.detach() != 0)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not bool((parameter != 0).all())
    }
