"""Scores of changes: the predicted cost of each candidate that may replace a layer's weight."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hesse.curvature import Curvature, GaussNewton, Gram, Kronecker, Objective
from hesse.errors import OptionError, UnsupportedProduct
from hesse.scores.interactions import Changes, with_all_layers
from hesse.scores.score import CHANGES, SCORES, Score, add_score, register_score
from hesse.solvers import hutchinson_trace, lanczos

PROBES = 64  # of Hutchinson's estimate of a trace that is known by products only
SHARDS = 4  # of the data, for predictors that look at how an eigenvalue differs between them

Costs = dict[str, list[float]]  # by parameter, of each of its changes


@dataclass(frozen=True, eq=False)
class Candidates:
    """By parameter the changes d that are open to it: each candidate is a part, one parameter's after another's."""

    changes: Changes
    kind = "changes"

    @property
    def count(self) -> int:
        """Number of candidates of all parameters."""
        return sum(len(own) for own in self.changes.values())


@dataclass(frozen=True, eq=False)
class LossOfChanges:
    """The loss as a function of the parameters that may change; `curvature` makes H of an objective."""

    objective: Objective
    curvature: Callable[[Objective], Curvature] = lambda objective: GaussNewton(objective=objective)


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Score):
    """½ s_l ‖d‖² for a change d of layer l, with one number s_l made of the layer's own curvature H_l.

    `coefficient` takes H_l on all data, or with `shards` H_l on each of several parts of the data. With `nats` the mean
    over all directions of d is ½ dᵀHd; otherwise costs rank layers and have no unit. With `eigenvalues` it needs the
    whole output factor, not its diagonal alone.
    """

    coefficient: Callable[[Sequence[Curvature]], float] = field(repr=False)
    shards: bool = False
    eigenvalues: bool = False
    parts: tuple[str, ...] = CHANGES

    def cost(self, evidence: LossOfChanges, partition: Candidates) -> Tensor:
        costs: list[float] = []
        for name, own in partition.changes.items():
            layer = replace(evidence.objective, names=(name,))
            parts = _shards(layer) if self.shards else [layer]
            half = 0.5 * self.coefficient([evidence.curvature(part) for part in parts])
            costs += [half * float(change.double().square().sum()) for change in own]
        return torch.tensor(costs, dtype=torch.float64)


def mean_curvature(curvatures: Sequence[Curvature]) -> float:
    """Return Tr H / n, the mean curvature over all directions."""
    return trace(curvatures[0]) / curvatures[0].shape.numel()


def trace(curvature: Curvature) -> float:
    """Return Tr H, by Hutchinson's estimate where H is known by products only."""
    try:
        return curvature.trace()
    except UnsupportedProduct:
        return float(hutchinson_trace(curvature, PROBES).value)


def largest_eigenvalue(curvature: Curvature) -> float:
    """Return λ_max(H), by Lanczos; of a Kronecker the product of its factors', whose vectors are short."""
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


add_score(
    Sensitivity(
        name="hawq",
        source="HAWQ, Dong et al., 2019, arXiv:1905.03696",
        coefficient=lambda curvatures: largest_eigenvalue(curvatures[0]) / curvatures[0].shape.numel(),
        eigenvalues=True,
    )
)
add_score(
    Sensitivity(
        name="hawq-v2",
        source="HAWQ-V2, Dong et al., 2019, arXiv:1911.03852",
        coefficient=mean_curvature,
        nats=True,
    )
)
add_score(
    Sensitivity(
        name="q-bert",
        source="Q-BERT, Shen et al., 2019, arXiv:1909.05840",
        coefficient=_of_shards,
        shards=True,
        eigenvalues=True,
    )
)


@register_score("second-order", source="½ dᵀH_l d of each layer alone", parts=CHANGES, nats=True)
def second_order(evidence: LossOfChanges, partition: Candidates) -> Tensor:
    """½ dᵀH_l d, each layer alone."""
    costs: list[float] = []
    for name, own in partition.changes.items():
        block = evidence.curvature(replace(evidence.objective, names=(name,)))
        costs += [block.quadratic(change.flatten()) for change in own]
    return torch.tensor(costs, dtype=torch.float64)


@register_score("inter-layer", source="Schaefer et al., 2023, arXiv:2306.04879", parts=CHANGES, nats=True)
def inter_layer(evidence: LossOfChanges, partition: Candidates) -> Tensor:
    """The layer's own share of ½ dᵀHd where all layers are changed in the same way (see `with_all_layers`)."""
    costs = with_all_layers(evidence.curvature(evidence.objective), evidence.objective, partition.changes)
    return torch.tensor([cost for own in costs.values() for cost in own], dtype=torch.float64)


def find_sensitivity(name: str) -> Sensitivity:
    """Return the score of that name that makes one number of a layer's curvature.

    Raises:
        OptionError: there is none.
    """
    found = SCORES.get(name)
    if not isinstance(found, Sensitivity):
        names = [score.name for score in SCORES.values() if isinstance(score, Sensitivity)]
        raise OptionError(f"there is no sensitivity {name!r}; there are {', '.join(names)}")
    return found


def predicted_costs(
    objective: Objective,
    changes: Changes,
    sensitivity: str,
    curvature: Callable[[Objective], Curvature] = lambda objective: GaussNewton(objective=objective),
) -> Costs:
    """Return the predicted cost of each of the `changes` of each parameter, by the score of changes of that name.

    Costs below zero are taken as zero. `curvature` makes H of an objective, such as a Gauss-Newton matrix, or the
    Hessian.

    Raises:
        OptionError: there is no such score, or a change does not fit its parameter.
    """
    if sensitivity not in SCORES or SCORES[sensitivity].parts != CHANGES:
        names = [score.name for score in SCORES.values() if score.parts == CHANGES]
        raise OptionError(f"there is no sensitivity {sensitivity!r}; there are {', '.join(names)}")
    costs = SCORES[sensitivity].costs(LossOfChanges(objective, curvature), Candidates(changes)).clamp(min=0)
    parts = torch.split(costs, [len(own) for own in changes.values()])
    return {name: part.tolist() for name, part in zip(changes, parts, strict=True)}


def _shards(objective: Objective) -> list[Objective]:
    """The batches of an objective dealt out to several, as many as there are batches for."""
    batches = list(objective.data)
    return [replace(objective, data=batches[start::SHARDS]) for start in range(min(SHARDS, len(batches)))]
