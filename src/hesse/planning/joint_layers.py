"""Interactions d_iᵀ H_ij d_j between changes of layers, and layers that are planned together because of them."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.errors import OptionError
from hesse.planning.problem import Candidate, Choice, ChoiceGroup, Problem

MOST_JOINT = 4096  # candidates of a block of layers


def dependent_blocks(interactions: Tensor, threshold: float, most: int) -> list[list[int]]:
    """Return blocks of consecutive layers that are planned together, as lists of indices.

    `interactions` (layers, layers) are those of one change per layer. A layer joins the preceding block if its relative
    interaction |c_ij| / √(c_ii c_jj) with a layer of the block is above `threshold`, until the block has `most` layers.
    Source: the partition of Q-VLM (Wang et al., 2024, arXiv:2410.08119), by H in place of an entropy of activations.
    """
    sizes = interactions.diagonal().clamp(min=torch.finfo(interactions.dtype).tiny).sqrt()
    related = (interactions / sizes / sizes[:, None]).abs()
    blocks = [[0]]
    for layer in range(1, len(interactions)):
        near = len(blocks[-1]) < most and float(related[layer, blocks[-1]].max()) > threshold
        blocks[-1].append(layer) if near else blocks.append([layer])
    return blocks


def joint_problem(problem: Problem, costs: Tensor, blocks: Sequence[Sequence[int]]) -> Problem:
    """Return the problem with the groups of each block as one group, with a candidate for each combination of choices.

    `costs` (k, k) are the interactions of all candidates of all groups in order. Interactions count within a block, not
    between blocks.

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
            places = [starts[place] + index for place, index in zip(block, choice, strict=True)]
            chosen = [group.candidates[index] for group, index in zip(members, choice, strict=True)]
            loss = max(float(costs[places][:, places].sum()), 0.0)
            label = ", ".join(candidate.label for candidate in chosen)
            candidates.append(Candidate(label, sum(candidate.size for candidate in chosen), loss))
        groups.append(ChoiceGroup(", ".join(group.name for group in members), tuple(candidates)))
    return Problem(tuple(groups))


def single_choice(problem: Problem, blocks: Sequence[Sequence[int]], joint: Choice) -> Choice:
    """Return the choice for each group that a choice for the blocks of `joint_problem` implies."""
    places: dict[int, int] = {}
    for block, index in zip(blocks, joint, strict=True):
        chosen = next(itertools.islice(_ways([problem.groups[place] for place in block]), index, None))
        places |= zip(block, chosen, strict=True)
    return tuple(places[place] for place in range(len(problem.groups)))


def _ways(groups: Sequence[ChoiceGroup]) -> "itertools.product[tuple[int, ...]]":
    return itertools.product(*(range(len(group.candidates)) for group in groups))
