"""Find the most aggressive choice that a measurement accepts, by bisection along a sorted list."""

from collections.abc import Callable

from hesse.errors import OptionError
from hesse.planning.problem import Choice, Problem


def smallest_accepted(problem: Problem, accepts: Callable[[Choice], bool]) -> Choice:
    """Lower groups in order of predicted loss as long as `accepts` returns True, and return the last accepted choice.

    Each group has the same number of candidates, from the most careful to the most aggressive. In each step the groups
    that took the previous step are sorted by the predicted cost of the next one, and bisection finds the longest prefix
    of this list that `accepts` allows: about log₂(groups) measurements per step. The returned choice was measured and
    accepted; if acceptance is not monotone along the list, a longer prefix may exist. Source: the search of Schaefer et
    al., 2023 (arXiv:2306.04879).

    Raises:
        OptionError: groups have different numbers of candidates, or not even the most careful choice is accepted.
    """
    levels = {len(group.candidates) for group in problem.groups}
    if len(levels) != 1:
        raise OptionError("groups are lowered step by step, so each needs as many candidates as the others")
    best: Choice = (0,) * len(problem.groups)
    if not accepts(best):
        raise OptionError("not even the most careful choice is accepted: ask for less, or offer more careful ones")
    lowered = list(range(len(problem.groups)))
    for level in range(1, levels.pop()):
        order = sorted(lowered, key=lambda place: problem.groups[place].candidates[level].loss)
        most, tried = 0, len(order) + 1  # accepted, and refused
        while tried - most > 1:
            middle = (most + tried) // 2
            choice = tuple(level if place in order[:middle] else own for place, own in enumerate(best))
            if accepts(choice):
                most = middle
            else:
                tried = middle
        lowered = order[:most]
        best = tuple(level if place in lowered else own for place, own in enumerate(best))
    return best
