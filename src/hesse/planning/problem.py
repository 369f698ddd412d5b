"""What is shared: groups of layers, what may be done to each, and what choices cost together."""

import math
from dataclasses import dataclass

from hesse.errors import OptionError

Choice = tuple[int, ...]  # for each group the place of its candidate


@dataclass(frozen=True)
class Candidate:
    """One thing that may be done to a group of layers."""

    label: str
    size: int  # bytes that the group's layers then take, scales and zero points included
    loss: float  # nats per token that it costs alone, 0 or more


@dataclass(frozen=True)
class ChoiceGroup:
    """Layers that share one scheme."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Problem:
    """Groups to choose for; the losses of their choices add up, as those of a block-diagonal curvature do.

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
        """Each group's candidate."""
        return [group.candidates[place] for group, place in zip(self.groups, choice, strict=True)]

    def size(self, choice: Choice) -> int:
        """Bytes of all groups together."""
        return sum(candidate.size for candidate in self.chosen(choice))

    def loss(self, choice: Choice) -> float:
        """Predicted loss increase of all choices together, in nats per token."""
        return math.fsum(candidate.loss for candidate in self.chosen(choice))

    @property
    def smallest(self) -> int:
        """Bytes where every group takes its smallest candidate."""
        return sum(min(candidate.size for candidate in group.candidates) for group in self.groups)

    @property
    def largest(self) -> int:
        """Bytes above which nothing is gained: every group at its least loss."""
        return sum(min((c.loss, c.size) for c in group.candidates)[1] for group in self.groups)
