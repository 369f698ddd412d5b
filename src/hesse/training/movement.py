"""Movement pruning: keep the weights that training moves away from zero."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.constraints import Sparse
from hesse.errors import OptionError
from hesse.training.held import Held, straight_through
from hesse.training.schedules import GradualSchedule


@dataclass(frozen=True, eq=False)
class Movement(Held):
    """Parametrization by a weight w times a mask of the highest scores s, both trained.

    The mask passes its gradient straight to the scores, so that a step of plain gradient descent adds
    -rate · (dL/dw') ⊙ w to them, for masked weights too: s grows where w moves away from zero. Only the order of scores
    matters, so they need no separate rate. `pattern` is the final one, Sparse(0.9) or Sparse(2, 4); the schedule gives
    the share of zeros at each step. Source: Sanh et al., 2020, arXiv:2005.07683.

    Raises:
        OptionError: the schedule prunes before the scores differ.
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
        kept = partial_mask(self.pattern, self.schedule.share(self.step), scores.detach().flatten(1))
        return weight * straight_through(kept.view(scores.shape).to(scores), scores)

    def at(self, step: int) -> Self:
        return replace(self, step=step)


def partial_mask(pattern: Sparse, share: float, scores: Tensor) -> Tensor:
    """Return the mask of the highest `scores` (out, in) on the way to a pattern, with `share` of the entries zero.

    On the way to N:M every M entries keep the number that gives the share, at least N.
    """
    return partial_pattern(pattern, share).mask(scores)


def partial_pattern(pattern: Sparse, share: float) -> Sparse:
    """Return the pattern with a schedule's share of zeros; for N:M the next pattern with at most that share."""
    if pattern.of is None:
        return replace(pattern, amount=share)
    kept = pattern.of - int(share * pattern.of + 1e-9)
    return replace(pattern, amount=max(kept, int(pattern.amount))) if kept < pattern.of else Sparse(0.0)


def share_of(pattern: Sparse) -> float:
    """Return the share of zeros of a pattern."""
    return pattern.amount if pattern.of is None else 1 - pattern.amount / pattern.of
