"""What changes of several layers do to one another: d_iᵀ H_ij d_j, and layers that are planned together for it."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesse.curvature import Curvature, Objective
from hesse.errors import OptionError
from hesse.planning.problem import Candidate, Choice, Group, Problem

Changes = Mapping[str, Sequence[Tensor]]  # by parameter, what may become of it less what it is
TOGETHER = 8  # products with H that are asked for at once
MOST_JOINT = 4096  # candidates of a block of layers


def interactions(curvature: Curvature, objective: Objective, changes: Changes) -> Tensor:
    """½ d_aᵀ H d_b of all changes, one parameter's after another's (k, k) in float64.

    H is of all parameters of `objective`; a change is zero but for its own parameter. It costs a product for each
    change, and the memory of a few of them.

    Raises:
        OptionError: a change does not fit its parameter.
    """
    places = [(name, change) for name, own in changes.items() for change in own]
    rows = []
    for start in range(0, len(places), TOGETHER):
        some = torch.stack([_alone(objective, {name: change}) for name, change in places[start : start + TOGETHER]])
        pieces = dict(zip(objective.names, objective.split(curvature.matvec(some)), strict=True))
        rows.append(
            torch.stack([(pieces[name].double() * change.double()).flatten(1).sum(1) for name, change in places], dim=1)
        )
    found = torch.cat(rows)
    return (found + found.T) / 4


def with_all_layers(curvature: Curvature, objective: Objective, changes: Changes) -> dict[str, list[float]]:
    """Each layer's own part of ½ dᵀHd where all layers are changed alike: ½ ⟨d_l, (H d)_l⟩, from one product.

    That is ½ d_lᵀ H_ll d_l, augmented by half of what its change and those of all others do to one another; the parts
    of all layers sum to the whole. Place k of every parameter's changes is made together. Source: the inter-layer term
    of Schaefer et al., 2023 (arXiv:2306.04879), which measures it pair by pair.

    Raises:
        OptionError: parameters have different numbers of changes.
    """
    if len({len(own) for own in changes.values()}) != 1:
        raise OptionError("layers are changed alike, so each needs as many candidates as the others, in the same order")
    found: dict[str, list[float]] = {name: [] for name in changes}
    for level in zip(*changes.values(), strict=True):
        made = dict(zip(changes, level, strict=True))
        product = objective.split(curvature.matvec(_alone(objective, made)))
        pieces = dict(zip(objective.names, product, strict=True))
        for name, change in made.items():
            found[name].append(0.5 * float((pieces[name].double() * change.double()).sum()))
    return found


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
        groups.append(Group(", ".join(group.name for group in members), tuple(candidates)))
    return Problem(tuple(groups))


def single_choice(problem: Problem, blocks: Sequence[Sequence[int]], joint: Choice) -> Choice:
    """What a choice for the blocks of `joint_problem` means for each group."""
    places: dict[int, int] = {}
    for block, own in zip(blocks, joint, strict=True):
        chosen = next(itertools.islice(_ways([problem.groups[place] for place in block]), own, None))
        places |= zip(block, chosen, strict=True)
    return tuple(places[place] for place in range(len(problem.groups)))


def _ways(groups: Sequence[Group]) -> "itertools.product[tuple[int, ...]]":
    return itertools.product(*(range(len(group.candidates)) for group in groups))


def _alone(objective: Objective, changes: Mapping[str, Tensor]) -> Tensor:
    """Changes of some parameters as a flat vector (size,)."""
    for name, change in changes.items():
        if name not in objective.named or change.shape != objective.named[name].shape:
            raise OptionError(f"a change {tuple(change.shape)} does not fit the parameter {name} of the objective")
    return objective.join([changes.get(name) for name in objective.names])
