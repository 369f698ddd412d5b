"""Nyström approximation of a layer: inputs chosen by ridge leverage scores, and the weights on these alone."""

from typing import cast

import torch
from torch import Tensor

from hesse.errors import ConditioningError

STEPS = 60  # of bisection, enough for the last digit of the ridge


def kept_units(moment: Tensor, count: int) -> Tensor:
    """Return the `count` inputs of highest ridge leverage [A (A + λI)⁻¹]_jj (count,), ascending; A (in, in) = E[zzᵀ].

    λ is chosen such that the scores sum to `count`. Source of the scores: MoDeGPT
    (Lin et al., 2024); the choice of λ is ours.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0)
    low, high = 0.0, float(values.sum())  # where the scores sum to at most 1
    for _ in range(STEPS):
        middle = (low + high) / 2
        more = float((values / (values + middle)).sum()) > count
        low, high = (middle, high) if more else (low, middle)
    ridge = max(high, torch.finfo(torch.float64).tiny)
    scores = vectors.square() @ (values / (values + ridge))
    return cast(Tensor, scores.topk(count).indices.sort().values)


def nystroem_weight(weight: Tensor, moment: Tensor, units: Tensor) -> Tensor:
    """Return the weights (out, units) on the inputs `units` alone with outputs nearest to those of `weight` (out, in).

    The minimum over W' of E‖W z - W' z_S‖² is W A_:S A_SS⁻¹, the Nyström approximation of A behind W; directions of
    A_SS without inputs to the working precision of float32 are left out.

    Raises:
        ConditioningError: all inputs are zero.
    """
    wide = moment.double()
    values, vectors = torch.linalg.eigh(wide[units][:, units])
    seen = values > values.amax() * len(units) * torch.finfo(torch.float32).eps
    if not bool((values > 0).any()):
        raise ConditioningError("all inputs of this layer are zero on this data: use other samples")
    inverse = (vectors[:, seen] / values[seen]) @ vectors[:, seen].T
    return cast(Tensor, (weight.double() @ wide[:, units] @ inverse).to(weight.dtype))
