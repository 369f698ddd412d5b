"""One slope for all groups: what a byte more is worth is the same everywhere (Lagrange; Shoham and Gersho, 1988)."""

from hesse.errors import OptionError
from hesse.planning.problem import Choice, ChoiceGroup, Problem


def by_common_slope(problem: Problem, size: int) -> Choice:
    """The choice on the lower convex hulls of all groups at the common slope that `size` bytes allow.

    Sorting, in place of a mixed-integer program: no choice of its own size or less costs less, and at most one step of
    one group lies between it and what `cheapest_within` may find. Candidates above their group's hull are never chosen.

    Raises:
        OptionError: no choice is that small; the message says how small the smallest is.
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
    """The places of the candidates on the lower convex hull of loss over size, from the smallest size on."""
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
