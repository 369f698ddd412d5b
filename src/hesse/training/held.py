"""What stays true of a weight while it is trained: its zeros, its codes, or that it is in a set."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from hesse.constraints import Constraint, Grid
from hesse.constraints.grouped import GridCode, Scales
from hesse.errors import OptionError


class Held(Protocol):
    """A weight as a function of what is trained in its place, so that every step ends in an allowed weight."""

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What is trained in the place of `weight`, as it is at the start.

        Raises:
            OptionError: a weight of that shape cannot be held in this way.
        """

    def weight(self, *free: Tensor) -> Tensor:
        """The allowed weight; differentiable in `free`, truly or by an estimate that the class names."""

    def at(self, step: int) -> Self:
        """What is held at a step of the training; itself, unless it changes."""


class Lasting:
    """A Held that is the same at every step."""

    def at(self, step: int) -> Self:
        """Itself."""
        return self


@dataclass(frozen=True, eq=False)
class HeldZeros(Lasting):
    """Weights that are zero stay zero, unstructured or N:M; the gradient is exact."""

    kept: Tensor  # the weight's shape, True where it is not held at zero

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        if weight.shape != self.kept.shape:
            raise OptionError(f"a mask {tuple(self.kept.shape)} does not fit a weight {tuple(weight.shape)}")
        return (weight,)

    def weight(self, *free: Tensor) -> Tensor:
        (weight,) = free
        return torch.where(self.kept.to(weight.device), weight, 0.0)


@dataclass(frozen=True, eq=False)
class HeldCodes(Lasting):
    """The codes of a Grid stay, and the scales are trained: by a factor each, which starts at 1.

    weight = factor · scale · (code - zero point), which is smooth, so that the gradient is exact where a
    straight-through one is an estimate; and a step of an optimiser is a share of a scale, whatever the scale is. Scales
    are trained in the model's precision and not rounded to the grid's. Source: PEQA (Kim et al., 2023,
    arXiv:2305.14152).
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
        """The stored form for the factors that training found (out, groups)."""
        scales = Scales(self.grid.stored_scale(factor * self.code.scales.scale), self.code.scales.zero_point)
        return GridCode(self.code.codes, scales)


@dataclass(frozen=True, eq=False)
class StraightThrough(Lasting):
    """The weight is the member of a constraint that is nearest to a free one, which takes the weight's gradient.

    The free weight moves on between members, so codes and zeros can change, at the price of a biased gradient.
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


def straight_through(value: Tensor, free: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `free`, which has its shape."""
    return value + (free - free.detach())


def held_zeros(model: nn.Module) -> dict[str, Held]:
    """The zeros of a pruned model's matrices and kernels, to be held: by the names of those that have some."""
    return {
        name: HeldZeros(parameter.detach() != 0)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not bool((parameter != 0).all())
    }


def check_names(held: Mapping[str, Held], model: nn.Module) -> None:
    """Refuse names that are no parameters.

    Raises:
        OptionError: one is none.
    """
    known = dict(model.named_parameters())
    for name in held:
        if name not in known:
            raise OptionError(
                f"the model has no parameter {name!r} to hold; one is called {next(iter(known), 'nothing')}"
            )
