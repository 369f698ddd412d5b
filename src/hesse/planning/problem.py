"""Planning problem: groups of layers, the candidates of each, and the cost of choices."""

import math
from dataclasses import dataclass

from hesse.errors import OptionError

Choice = tuple[int, ...]  # for each group the index of its candidate


@dataclass(frozen=True)
class Candidate:
    """A candidate for a group of layers, with its size and predicted loss."""

    label: str
    size: int  # bytes of the group's layers, including scales and zero points
    loss: float  # predicted increase if only this group changes, nats per token, 0 or more


@dataclass(frozen=True)
class ChoiceGroup:
    """Layers that share one scheme."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Problem:
    """Groups to choose for; the losses of choices add up, as under a block-diagonal curvature.

    Raises:
        OptionError: a group has no candidates, or a loss is negative or not finite.
    """

    groups: tuple[ChoiceGroup, ...]

    def __post_init__(self) -> None:
        for group in self.groups:
            if not group.candidates:
                raise OptionError(f"{group.name} has no candidates to choose among")
            for candidate in group.candidates:
                if not (math.isfinite(candidate.loss) and candidate.loss >= 0):
                    raise OptionError(f"{group.name}: {candidate.label} costs {candidate.loss}: give 0 or more nats")

    def chosen(self, choice: Choice) -> list[Candidate]:
        """Return the chosen candidate of each group."""
        return [group.candidates[place] for group, place in zip(self.groups, choice, strict=True)]

    def size(self, choice: Choice) -> int:
        """Return the total size of a choice, in bytes."""
        return sum(candidate.size for candidate in self.chosen(choice))

    def loss(self, choice: Choice) -> float:
        """Return the total predicted loss increase of a choice, in nats per token."""
        return math.fsum(candidate.loss for candidate in self.chosen(choice))

    @property
    def smallest(self) -> int:
        """Return the size if every group takes its smallest candidate, in bytes."""
        return sum(min(candidate.size for candidate in group.candidates) for group in self.groups)

    @property
    def largest(self) -> int:
        """Return the size if every group takes its candidate of least loss, in bytes; more bytes gain nothing."""
        return sum(min((c.loss, c.size) for c in group.candidates)[1] for group in self.groups)
