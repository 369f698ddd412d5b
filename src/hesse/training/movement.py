"""Movement pruning: what is kept is what training moves away from zero."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.constraints import Sparse
from hesse.errors import OptionError
from hesse.training.held import straight_through
from hesse.training.schedules import GradualSchedule


@dataclass(frozen=True, eq=False)
class Movement:
    """A weight w times a mask of the highest scores s, both trained; a Held.

    The mask passes its gradient to the scores as if it were them, so that a step of plain gradient descent adds
    -rate · (dL/dw') ⊙ w to them, for masked weights too: s grows where w moves away from zero. Only their order
    counts, so they need no rate of their own. `pattern` is the final one, Sparse(0.9) or Sparse(2, 4), of which the
    schedule gives so much at each step. Source: Sanh et al., 2020, arXiv:2005.07683.

    Raises:
        OptionError: the schedule cuts before there are scores.
    """

    pattern: Sparse
    schedule: GradualSchedule
    step: int = 0

    def __post_init__(self) -> None:
        if self.schedule.first > 0:
            raise OptionError(
                f"the first cut of the schedule is to {self.schedule.first}, but scores begin equal: give first=0.0"
            )

    def free(self, weight: Tensor) -> tuple[Tensor, ...]:
        self.pattern.check(weight.flatten(1).shape)
        return weight, torch.zeros_like(weight)

    def weight(self, *free: Tensor) -> Tensor:
        weight, scores = free
        kept = so_much_of(self.pattern, self.schedule.share(self.step), scores.detach().flatten(1))
        return weight * straight_through(kept.view(scores.shape).to(scores), scores)

    def at(self, step: int) -> Self:
        return replace(self, step=step)


def so_much_of(pattern: Sparse, share: float, scores: Tensor) -> Tensor:
    """The mask of the highest of `scores` (out, in) on the way to a pattern, where so large a share is zero.

    On the way to N:M as many of every M are kept as hold the share, N or more.
    """
    return on_the_way(pattern, share).mask(scores)


def on_the_way(pattern: Sparse, share: float) -> Sparse:
    """The pattern with the share of zeros that a schedule asks for; of N:M the next one that has no more than that."""
    if pattern.of is None:
        return replace(pattern, amount=share)
    kept = pattern.of - int(share * pattern.of + 1e-9)
    return replace(pattern, amount=max(kept, int(pattern.amount))) if kept < pattern.of else Sparse(0.0)


def share_of(pattern: Sparse) -> float:
    """The share of zeros that a pattern has."""
    return pattern.amount if pattern.of is None else 1 - pattern.amount / pattern.of
