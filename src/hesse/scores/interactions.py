"""Costs of changes of several layers together beyond the sum of each alone: d_iᵀ H_ij d_j."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesse.curvature import Curvature, Objective
from hesse.errors import OptionError

Changes = Mapping[str, Sequence[Tensor]]  # by parameter, the candidates less the weight
TOGETHER = 8  # products with H in one call


def interactions(curvature: Curvature, objective: Objective, changes: Changes) -> Tensor:
    """Return ½ d_aᵀ H d_b of all changes, one parameter's after another's (k, k) in float64.

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
    """Return each layer's own part of ½ dᵀHd where all layers are changed alike: ½ ⟨d_l, (H d)_l⟩, from one product.

    That is ½ d_lᵀ H_ll d_l and half of the interactions of the layer's change with all others; the parts of all
    layers sum to the whole. Place k of every parameter's changes is made together. Source: the inter-layer term
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


def _alone(objective: Objective, changes: Mapping[str, Tensor]) -> Tensor:
    """Changes of some parameters as a flat vector (size,)."""
    for name, change in changes.items():
        if name not in objective.named or change.shape != objective.named[name].shape:
            raise OptionError(f"a change {tuple(change.shape)} does not fit the parameter {name} of the objective")
    return objective.join([changes.get(name) for name in objective.names])
