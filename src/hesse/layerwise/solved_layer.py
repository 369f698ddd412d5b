"""Solve one layer, put the solution in its place, and report it: the same for a checkpoint and for a module."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from hesse.constraints import Constraint
from hesse.estimation.statistics.output_factor import output_factor
from hesse.layerwise.input_rounding import rounding_cost
from hesse.layerwise.layer_report import layer_report
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver
from hesse.layerwise.report import LayerReport
from hesse.methods.recipe import Rule
from hesse.networks.network import Layer
from hesse.progress import Clock


class Storage(Protocol):
    """Storage of solved layers."""

    def constraint(self, name: str) -> Constraint | None:
        """Return the constraint of a layer as it can be stored; None leaves the layer unchanged."""

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        """Return the values that are stored for `weight` (out, in), which is solved as `encoded`."""

    def stored_bits(self, name: str) -> float:
        """Return the bits of a weight of a layer."""


@dataclass(frozen=True, eq=False)
class SolvedLayer:
    """A layer whose weight is now a member of its constraint."""

    report: LayerReport
    notes: list[str]
    encoded: Any  # as the constraint stores it
    stored: Tensor  # (out, in), the values that are stored


def solve_layer(
    layer: Layer, statistics: Mapping[str, Any], rule: Rule, storage: Storage, solver: LayerSolver, clock: Clock
) -> SolvedLayer:
    """Solve a layer by its rule for its statistics, and put the result in its place.

    Raises:
        HesseError: the layer cannot be solved; the message begins with its name.
    """
    constraint = storage.constraint(layer.name)
    assert constraint is not None
    with clock.phase("solve"):
        problem = LayerProblem(layer.name, layer.weight.detach().float(), dict(statistics), rule, constraint)
        solved = solver.solve(problem)
        encoded = solved.solution.encoded
        stored = storage.as_stored(layer.name, encoded, solved.solution.weight)
        layer.replace(stored)
    with clock.phase("predict"):
        report, notes = layer_report(problem, solved, stored.float(), storage.stored_bits(layer.name))
        if rule.input_bits is not None:
            cost, factor, peak = None, output_factor(problem.statistics), problem.statistics.get("input peaks")
            if factor is not None and peak is not None:
                cost = rounding_cost(stored, factor, peak, rule.input_bits)
            else:
                notes.append(f"{layer.name}: the prediction leaves out that its inputs are rounded")
            report = replace(report, input_bits=rule.input_bits, predicted_input_loss=cost)
    return SolvedLayer(report, [*solved.notes, *notes], encoded, stored)
