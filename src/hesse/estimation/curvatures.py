"""Estimate several curvatures from one pass of data through an objective."""

from collections.abc import Sequence
from typing import get_args

from hesse.curvature import Objective
from hesse.errors import OptionError, UnsupportedModelError
from hesse.estimation.estimates import Estimates, Name, Sums
from hesse.passes.per_sample import BUDGET, FisherKind, GradientPass
from hesse.passes.recorded_batch import GradientUnit


def estimate_curvatures(
    objective: Objective,
    curvatures: Sequence[Name],
    kind: FisherKind = "sampled",
    per: GradientUnit = "position",
    *,
    seed: int = 0,
    budget: int = BUDGET,
    block_size: int = 50,
) -> Estimates:
    """Estimate all curvatures in `curvatures` from one forward and one backward pass over the objective's data.

    - "gram": E[xxᵀ] of the inputs of each matrix (the weight of a linear, convolutional or embedding layer), over
      positions.
    - "kronecker": K-FAC. `per="position"` takes the positions of a sample (tokens, pixels) as independent samples
      (expand), `per="sample"` adds up the gradients and averages the inputs over them (reduce). A matrix gets its two
      factors, a bias E[ggᵀ], a norm's scale its diagonal; a weight tied between an embedding and a linear layer the sum
      of both. A convolution's weight is taken as (out, in · kernel). An embedding's input factor is diagonal: exactly
      so per position, only its diagonal per sample.
    - "fisher": the diagonal, "blocks": blocks of `block_size` weights on it, "rank-one": all gradients, kept, of the
      Fisher whose gradients are of whole samples.

    `kind="sampled"` draws labels from the model (the true Fisher, unbiased), `"empirical"` uses the labels of the data.
    Positions whose gradient is exactly zero, such as padding, are not counted. The unit is that of the objective's
    loss. `budget` bounds the bytes of recorded activations and gradients; it changes no result beyond rounding.
    Sources: Martens and Grosse, 2015; Grosse and Martens, 2016 (convolutions); Eschenhagen et al., 2023 (shared
    weights).

    Raises:
        OptionError: a curvature is not known, or a setting is not valid.
        UnsupportedModelError: a curvature needs a parameter's layer, and the parameter belongs to no supported layer.
        DataError: an input or a gradient is not finite, or no position has a gradient.
    """
    for name in curvatures:
        if name not in get_args(Name):
            raise OptionError(f"{name!r} is not a curvature estimated from data: use {', '.join(get_args(Name))}")
    if per not in get_args(GradientUnit):
        raise OptionError(f"factors are per 'position' or per 'sample', not {per!r}")
    kept = objective.size * objective.parameters[0].element_size() if "rank-one" in curvatures else 0
    apart = per == "sample" or not set(curvatures) <= {"gram", "kronecker"}
    walk = GradientPass(objective, kind, seed=seed, budget=budget, extra=kept, apart=apart)
    sums = Sums(walk.parts, objective.named, curvatures, per, block_size)
    for passage in walk:
        sums.add(passage)
    for other in walk.others if {"gram", "kronecker"} & set(curvatures) else []:
        if other in sums.without_factors and ("kronecker" not in curvatures or per == "sample"):
            continue
        raise UnsupportedModelError(
            f"{other} is no matrix, offset or scale of a supported layer, or is used otherwise than by its layer's "
            'call: leave it out, or ask for "fisher", which supports any parameter'
        )
    return sums.estimates(walk.scale, f"{kind} Fisher", f"{objective.loss.reduction} loss")
