"""How many groups each site gives up."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from hesse.errors import OptionError
from hesse.partitions import Group


@dataclass(frozen=True)
class Ranking:
    """The groups of a site in the order in which they would go, what each adds to the cost, and its parameters.

    `most` is how many may go, and `step` what a number that is the same everywhere is a multiple of.
    """

    site: str
    groups: Sequence[Group]
    costs: Sequence[float]
    parameters: int
    most: int
    step: int = 1


def uniform_numbers(rankings: Sequence[Ranking], amount: float) -> list[int]:
    """The same share of each site's groups, rounded."""
    return [
        ranking.step * min(round(amount * len(ranking.groups) / ranking.step), ranking.most // ranking.step)
        for ranking in rankings
    ]


def shared_numbers(rankings: Sequence[Ranking], amount: float) -> list[int]:
    """One ranking over all sites, by cost a parameter, until the share `amount` of their parameters is gone.

    Raises:
        OptionError: that is more than may go of all sites.
    """
    wanted = amount * sum(len(ranking.groups) * ranking.parameters for ranking in rankings)
    numbers = [0] * len(rankings)
    waiting = [_next(rankings, place, 0) for place, ranking in enumerate(rankings) if ranking.most]
    heapq.heapify(waiting)
    while wanted > 0.5 * min(ranking.parameters for ranking in rankings):
        if not waiting:
            raise OptionError(f"an amount of {amount} is more than may go of the layers: use less, or a higher cap")
        _, place = heapq.heappop(waiting)
        numbers[place] += 1
        wanted -= rankings[place].parameters
        if numbers[place] < rankings[place].most:
            heapq.heappush(waiting, _next(rankings, place, numbers[place]))
    return numbers


def _next(rankings: Sequence[Ranking], place: int, number: int) -> tuple[float, int]:
    return rankings[place].costs[number] / rankings[place].parameters, place
