"""Change each layer alone: the cost that each curvature predicts, and the measured cost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid, Sparse
from hesse.curvature import Curvature, Gram, Identity
from hesse.networks.network import Layer
from hesse.solvers import Estimate, Nearest, solve

SCHEMES: dict[str, Constraint] = {
    "8 bits": Grid(8, 128),
    "4 bits": Grid(4, 128),
    "3 bits": Grid(3, 128),
    "2 bits": Grid(2, 128),
    "50 % zeros": Sparse(0.5),
}


@dataclass(frozen=True)
class LayerInspection:
    """Predicted and measured costs of changing one layer, by scheme and curvature."""

    name: str
    shape: tuple[int, int]
    trace: tuple[float, float]  # of the layer's block of the Fisher, in nats per token; standard error over samples
    mean_eigenvalue: float
    predicted: dict[str, dict[str, float]]  # scheme: curvature: ½ dᵀHd, nats per token where the curvature has nats
    measured: dict[str, tuple[float, float]]  # scheme: KL(model || changed) in nats per token, and its standard error


def inspect_layer(
    layer: Layer,
    curvatures: dict[str, Curvature],
    trace: Estimate,
    measure: Callable[[], tuple[float, float]],
    advance: Callable[[], None],
) -> LayerInspection:
    """Round or zero `layer` by each scheme, measure, and restore it.

    `curvatures` refer to the layer's parameter, (in, out) if the layer is `transposed`; a Gram refers to rows (in,).
    `measure` is called while the layer is changed.
    """
    weight = layer.weight.detach().clone()
    predicted: dict[str, dict[str, float]] = {}
    measured: dict[str, tuple[float, float]] = {}
    for scheme, constraint in SCHEMES.items():
        changed = solve(weight, Identity(), constraint, Nearest()).weight.to(weight)
        change = changed - weight
        stored = change.T if layer.transposed else change
        predicted[scheme] = {
            kind: curvature.quadratic(change if isinstance(curvature, Gram) else stored)
            for kind, curvature in curvatures.items()
        }
        layer.weight.data.copy_(changed)
        try:
            measured[scheme] = measure()
        finally:
            layer.weight.data.copy_(weight)
        advance()
    value = float(trace.value)
    return LayerInspection(
        layer.name,
        (weight.shape[0], weight.shape[1]),
        (value, float(trace.standard_error)),
        value / weight.numel(),
        predicted,
        measured,
    )


def rank_correlations(layers: list[LayerInspection]) -> dict[str, dict[str, float]]:
    """Return Spearman's rank correlation over layers of predictions and measurements, by scheme and curvature."""
    return {
        scheme: {
            kind: rank_correlation(
                torch.tensor([layer.predicted[scheme][kind] for layer in layers]),
                torch.tensor([layer.measured[scheme][0] for layer in layers]),
            )
            for kind in layers[0].predicted[scheme]
        }
        for scheme in SCHEMES
    }


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors (n,); NaN if one is constant."""
    ranks = torch.stack([_ranks(left), _ranks(right)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return ranks from 0; equal values share their mean rank."""
    _, index, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    ranks: Tensor = (last - (count - 1) / 2)[index]
    return ranks
