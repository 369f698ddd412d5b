"""Curvatures that a rule can name, with their statistics and builders; and those of a loss, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hesse.curvature import (
    BlockRankOneSum,
    Curvature,
    Diagonal,
    GaussNewton,
    Gram,
    Hessian,
    Identity,
    Kronecker,
    Objective,
    RankOneSum,
)
from hesse.methods.solver_options import SolverOptions
from hesse.registry import Registry


class KnownLayer(Protocol):
    """Known data of a layer when it is solved."""

    @property
    def weight(self) -> Tensor:
        """Return the weight (out, in)."""

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Return the layer's known statistics by name (`hesse.estimation.statistics`)."""


@dataclass(frozen=True)
class CurvatureKind:
    """A curvature of one layer's weight, and the names of the statistics that it is built from.

    `build` takes the layer's known data, the solver's options and the damping. Layers with the same statistics share
    its result, so it may use the weight's shape (if `couples_rows`), but not the weight's values.
    """

    name: str
    needs: frozenset[str]
    build: Callable[[KnownLayer, SolverOptions, float], Curvature]
    couples_rows: bool = False  # a curvature of the whole weight (out, in), not the same for every row
    inverts_gram: bool = False  # so that with fewer tokens than inputs the solution depends on the damping


def _inputs(known: KnownLayer) -> Gram:
    return cast(Gram, known.statistics["inputs"])


def _reached(known: KnownLayer, name: str) -> Tensor | None:
    """Return a statistic of gradients; None if no gradient reached the layer."""
    value: Tensor | None = known.statistics.get(name)
    return None if value is None or not bool(value.any()) else value


def _weighted_gram(known: KnownLayer, _: SolverOptions, damping: float) -> Curvature:
    gram: Gram = known.statistics.get("weighted inputs", known.statistics["inputs"])
    return gram.damped(damping)


def _kronecker(name: str, known: KnownLayer, options: SolverOptions, damping: float) -> Curvature:
    """Return the Kronecker of the output factor `name` and the inputs."""
    factor = _reached(known, name)
    if factor is None:  # weigh all outputs equally
        factor = torch.ones_like(known.weight[:, 0])
    kronecker = Kronecker(output_factor=factor, input_factor=_inputs(known).second_moment)
    return kronecker.with_damped_factors(options.output_damping, damping)


def _fisher_diagonal(known: KnownLayer, _: SolverOptions, damping: float) -> Curvature:
    fisher = known.statistics.get("fisher diagonal")
    return Diagonal(values=torch.ones_like(known.weight) if fisher is None else fisher)


def _fisher_rows_columns(known: KnownLayer, _: SolverOptions, damping: float) -> Curvature:
    """F_ij ≈ (r_i c_j / m)² with the means r, c and m of √F over a row, a column and all: LQ-LoRA, Guo et al., 2023."""
    root = _fisher_or_ones(known).sqrt()
    rows, columns = root.mean(1), root.mean(0) / root.mean()
    return Kronecker(output_factor=rows**2, input_factor=columns**2).with_damped_factors(damping, damping)


def _fisher_columns(known: KnownLayer, _: SolverOptions, damping: float) -> Curvature:
    """F_ij ≈ its mean over the outputs i, one value an input: FWSVD, Hsu et al., 2022, whose layers are z = xW."""
    fisher = _fisher_or_ones(known)
    ones = torch.ones_like(fisher[:, 0])
    return Kronecker(output_factor=ones, input_factor=fisher.mean(0)).with_damped_factors(0, damping)


def _fisher_or_ones(known: KnownLayer) -> Tensor:
    """Return the Fisher's diagonal (out, in), or ones where nothing is known of it."""
    fisher = _reached(known, "fisher diagonal")
    return torch.ones_like(known.weight) if fisher is None else fisher


def _fisher_blocks(known: KnownLayer, _: SolverOptions, damping: float) -> Curvature:
    blocks = known.statistics.get("fisher blocks")
    if blocks is None:
        blocks = torch.eye(32).to(known.weight).repeat(-(-known.weight.numel() // 32), 1, 1)
    return BlockRankOneSum(matrices=blocks, weight_shape=tuple(known.weight.shape)).damped(damping)


def _fisher_gradients(known: KnownLayer, _: SolverOptions, damping: float) -> Curvature:
    gradients = _reached(known, "fisher gradients")
    if gradients is None:
        return RankOneSum.from_gradients(torch.zeros_like(known.weight)[None]).with_damping(1)
    return RankOneSum.from_gradients(gradients).damped(damping, of="range")  # fewer gradients than weights


_KINDS = (
    CurvatureKind("identity", frozenset(), lambda known, options, damping: Identity()),
    CurvatureKind(
        "gram_diagonal", frozenset({"inputs"}), lambda known, _, damping: _inputs(known).damped(damping).diagonal_part()
    ),
    CurvatureKind("gram", frozenset({"inputs"}), lambda known, _, damping: _inputs(known).damped(damping), False, True),
    CurvatureKind("weighted_gram", frozenset({"inputs", "weighted inputs"}), _weighted_gram, inverts_gram=True),
    CurvatureKind("fisher_diagonal", frozenset({"fisher diagonal"}), _fisher_diagonal),
    CurvatureKind("fisher_rows_columns", frozenset({"fisher diagonal"}), _fisher_rows_columns),
    CurvatureKind("fisher_columns", frozenset({"fisher diagonal"}), _fisher_columns),
    CurvatureKind("fisher_blocks", frozenset({"fisher blocks"}), _fisher_blocks),
    CurvatureKind("fisher_gradients", frozenset({"fisher gradients"}), _fisher_gradients),
    *(
        CurvatureKind(name, frozenset({"inputs", factor}), partial(_kronecker, factor), True, inverts_gram=True)
        for name, factor in (("kronecker", "output factor"), ("attention", "attention factor"))
    ),
)
CURVATURES = Registry("curvature", entries={kind.name: kind for kind in _KINDS})
# Curvatures of a loss as a function of parameters.
LOSS_CURVATURES: Registry[Callable[[Objective], Curvature]] = Registry(
    "curvature of a loss",
    entries={
        "gauss_newton": lambda objective: GaussNewton(objective=objective),
        "hessian": lambda objective: Hessian(objective=objective),
    },
)
