"""What a change of one layer is thought to cost before a budget is shared out: the predictors of the literature."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hesse.curvature import Curvature, GaussNewton, Gram, Kronecker, Objective
from hesse.errors import OptionError, UnsupportedProduct
from hesse.scores.interactions import Changes, with_all_layers
from hesse.solvers import hutchinson_trace, lanczos

PROBES = 64  # of Hutchinson's estimate of a trace that is known by products only
SHARDS = 4  # of the data, for predictors that look at how an eigenvalue differs between them

Costs = dict[str, list[float]]  # by parameter, of each of its changes


@dataclass(frozen=True)
class Sensitivity:
    """½ s_l ‖d‖² for a change d of layer l, with one number s_l made of the layer's own curvature H_l.

    `coefficient` is given H_l on all data, or where `shards` on each of several parts of it. `in_nats` says that the
    mean over all directions of d is ½ dᵀHd; otherwise costs rank layers and have no unit.
    """

    name: str
    source: str
    coefficient: Callable[[Sequence[Curvature]], float]
    shards: bool = False
    in_nats: bool = False
    eigenvalues: bool = False


def trace(curvature: Curvature) -> float:
    """Tr H, by Hutchinson's estimate where H is known by products only."""
    try:
        return curvature.trace()
    except UnsupportedProduct:
        return float(hutchinson_trace(curvature, PROBES).value)


def largest_eigenvalue(curvature: Curvature) -> float:
    """λ_max(H), by Lanczos; of a Kronecker the product of its factors', whose vectors are short."""
    if isinstance(curvature, Kronecker):
        sides = (curvature.output_factor, curvature.input_factor)
        return math.prod(
            float(side.amax()) if side.ndim == 1 else largest_eigenvalue(Gram(second_moment=side, tokens=1))
            for side in sides
        )
    return float(lanczos(curvature, tolerance=1e-3, max_products=min(100, curvature.shape.numel())).values[0])


def _of_shards(shards: Sequence[Curvature]) -> float:
    values = [largest_eigenvalue(shard) for shard in shards]
    return abs(statistics.fmean(values)) + statistics.pstdev(values)


_ALL = (
    Sensitivity(
        "hawq",
        "Dong et al., 2019, arXiv:1905.03696",
        lambda shards: largest_eigenvalue(shards[0]) / shards[0].shape.numel(),
        eigenvalues=True,
    ),
    Sensitivity(
        "hawq-v2",
        "Dong et al., 2019, arXiv:1911.03852",
        lambda shards: trace(shards[0]) / shards[0].shape.numel(),
        in_nats=True,
    ),
    Sensitivity("q-bert", "Shen et al., 2019, arXiv:1909.05840", _of_shards, shards=True, eigenvalues=True),
)
SENSITIVITIES = {each.name: each for each in _ALL}


def find_sensitivity(name: str) -> Sensitivity:
    """The predictor of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in SENSITIVITIES:
        raise OptionError(f"there is no sensitivity {name!r}; there are {', '.join(SENSITIVITIES)}")
    return SENSITIVITIES[name]


def predicted_costs(
    objective: Objective,
    changes: Changes,
    sensitivity: str,
    curvature: Callable[[Objective], Curvature] = lambda objective: GaussNewton(objective=objective),
) -> Costs:
    """What each of the `changes` of each parameter is predicted to cost by a predictor of that name.

    Besides those of the table "second-order" is ½ dᵀH_l d, each layer alone, and "inter-layer" what is the layer's own
    of ½ dᵀHd where all layers are changed in the same way (see `with_all_layers`). Costs below zero are taken as zero.
    `curvature` makes H of an objective, such as a Gauss-Newton matrix, or the Hessian.

    Raises:
        OptionError: there is no such predictor, or a change does not fit its parameter.
    """
    if sensitivity == "inter-layer":
        return _positive(with_all_layers(curvature(objective), objective, changes))
    costs: Costs = {}
    for name, own in changes.items():
        layer = replace(objective, names=(name,))
        if sensitivity == "second-order":
            block = curvature(layer)
            costs[name] = [block.quadratic(change.flatten()) for change in own]
        else:
            found = find_sensitivity(sensitivity)
            parts = _shards(layer) if found.shards else [layer]
            half = 0.5 * found.coefficient([curvature(part) for part in parts])
            costs[name] = [half * float(change.double().square().sum()) for change in own]
    return _positive(costs)


def _positive(costs: Mapping[str, Sequence[float]]) -> Costs:
    return {name: [max(cost, 0.0) for cost in own] for name, own in costs.items()}


def _shards(objective: Objective) -> list[Objective]:
    """The batches of an objective dealt out to several, as many as there are batches for."""
    batches = list(objective.data)
    return [replace(objective, data=batches[start::SHARDS]) for start in range(min(SHARDS, len(batches)))]
