"""What changes of several layers do to one another: d_iᵀ H_ij d_j, and layers that are planned together for it."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.errors import OptionError
from hesse.planning.problem import Candidate, Choice, ChoiceGroup, Problem

MOST_JOINT = 4096  # candidates of a block of layers


def dependent_blocks(own: Tensor, threshold: float, most: int) -> list[list[int]]:
    """Consecutive layers that are planned together, as lists of their places.

    `own` (layers, layers) are the interactions of one change of each. A layer joins the block before it where what it
    and one of the block do to each other is above `threshold` of what they do alone, |c_ij| / √(c_ii c_jj), until the
    block has `most`. Source: the partition of Q-VLM (Wang et al., 2024, arXiv:2410.08119), by H in place of an entropy
    of activations.
    """
    sizes = own.diagonal().clamp(min=torch.finfo(own.dtype).tiny).sqrt()
    related = (own / sizes / sizes[:, None]).abs()
    blocks = [[0]]
    for layer in range(1, len(own)):
        near = len(blocks[-1]) < most and float(related[layer, blocks[-1]].max()) > threshold
        blocks[-1].append(layer) if near else blocks.append([layer])
    return blocks


def joint_problem(problem: Problem, costs: Tensor, blocks: Sequence[Sequence[int]]) -> Problem:
    """The same choices with the groups of each block as one: a candidate for each way to choose in all of them.

    `costs` are the interactions of all candidates of all groups in order (k, k). Within a block all of them count,
    between blocks none does.

    Raises:
        OptionError: a block has more than 4,096 candidates.
    """
    starts = list(itertools.accumulate((len(group.candidates) for group in problem.groups), initial=0))
    groups = []
    for block in blocks:
        members = [problem.groups[place] for place in block]
        number = math.prod(len(group.candidates) for group in members)
        if number > MOST_JOINT:
            raise OptionError(f"a block of {len(block)} layers has {number:,} candidates: offer fewer, or join fewer")
        candidates = []
        for choice in _ways(members):
            places = [starts[place] + own for place, own in zip(block, choice, strict=True)]
            chosen = [group.candidates[own] for group, own in zip(members, choice, strict=True)]
            loss = max(float(costs[places][:, places].sum()), 0.0)
            label = ", ".join(candidate.label for candidate in chosen)
            candidates.append(Candidate(label, sum(candidate.size for candidate in chosen), loss))
        groups.append(ChoiceGroup(", ".join(group.name for group in members), tuple(candidates)))
    return Problem(tuple(groups))


def single_choice(problem: Problem, blocks: Sequence[Sequence[int]], joint: Choice) -> Choice:
    """What a choice for the blocks of `joint_problem` means for each group."""
    places: dict[int, int] = {}
    for block, own in zip(blocks, joint, strict=True):
        chosen = next(itertools.islice(_ways([problem.groups[place] for place in block]), own, None))
        places |= zip(block, chosen, strict=True)
    return tuple(places[place] for place in range(len(problem.groups)))


def _ways(groups: Sequence[ChoiceGroup]) -> "itertools.product[tuple[int, ...]]":
    return itertools.product(*(range(len(group.candidates)) for group in groups))
