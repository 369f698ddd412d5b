"""Choose by a common slope: one more byte saves the same loss in every group (Lagrange; Shoham and Gersho, 1988)."""

from hesse.errors import OptionError
from hesse.planning.problem import Choice, ChoiceGroup, Problem


def by_common_slope(problem: Problem, size: int) -> Choice:
    """Return the choice on the lower convex hulls of all groups at the common slope that `size` bytes allow.

    The method sorts instead of solving a mixed-integer program: no choice of its size or less costs less, and it
    differs from the optimum of `cheapest_within` by at most one step of one group. Candidates above their group's hull
    are never chosen.

    Raises:
        OptionError: no choice is that small; the message gives the smallest size.
    """
    hulls = [lower_hull(group) for group in problem.groups]
    places = [0] * len(hulls)
    left = size - problem.smallest
    if left < 0:
        raise OptionError(f"nothing fits into {size:,} bytes: the smallest that can be reached is {problem.smallest:,}")
    steps = []
    for number, (group, hull) in enumerate(zip(problem.groups, hulls, strict=True)):
        for step in range(1, len(hull)):
            before, after = (group.candidates[place] for place in hull[step - 1 : step + 1])
            more = after.size - before.size
            steps.append(((before.loss - after.loss) / more, number, step, more))
    for _, number, step, more in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        if more > left:
            break
        places[number], left = step, left - more
    return tuple(hull[place] for hull, place in zip(hulls, places, strict=True))


def lower_hull(group: ChoiceGroup) -> list[int]:
    """Return the indices of the candidates on the lower convex hull of loss over size, in order of size."""
    candidates = group.candidates
    order = sorted(range(len(candidates)), key=lambda place: (candidates[place].size, candidates[place].loss))
    hull: list[int] = []
    for place in order:
        own = candidates[place]
        if hull and own.loss >= candidates[hull[-1]].loss:
            continue
        while len(hull) > 1:
            first, last = (candidates[kept] for kept in hull[-2:])
            if (first.loss - last.loss) * (own.size - first.size) > (first.loss - own.loss) * (last.size - first.size):
                break
            hull.pop()
        hull.append(place)
    return hull
