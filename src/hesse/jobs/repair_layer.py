"""Repair one layer: add the best low rank of its error against the dense model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.constraints import LowRank, LowRankCode
from hesse.errors import OptionError
from hesse.estimation.calibrated import Layers
from hesse.estimation.statistics.output_factor import output_factor
from hesse.jobs.repair_pair import Pair
from hesse.jobs.repair_report import RepairedLayer
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, effect
from hesse.layerwise.solved_layer import digest
from hesse.layerwise.workspace import layer_bytes
from hesse.methods import METHODS, Options, Rule
from hesse.networks.network import Layer
from hesse.progress import Clock

FORMATS = ("adapter", "dense")


@dataclass(frozen=True)
class RepairRequest:
    """The low rank to add.

    Raises:
        OptionError: a value is invalid.
    """

    rank: int
    curvature: str = "gram"
    format: str = "adapter"
    damping: float = 0.01
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        LowRank(self.rank)
        curvatures = METHODS["repair"].curvatures
        for option, value, known in (("--curvature", self.curvature, curvatures), ("--format", self.format, FORMATS)):
            if value not in known:
                raise OptionError(f"{option} is {value!r}: use {', '.join(known)}")
        if not 0 <= self.damping <= 1e4:
            raise OptionError(f"--damping is {self.damping}, but must be between 0 and 10000; 0.01 is usual")

    def rule(self) -> Rule:
        """Return the row of the table as a recipe's rule, with the requested curvature."""
        (rule,) = METHODS["repair"].recipe(Options(rank=self.rank, damping=self.damping)).rules
        return rule.model_copy(update={"curvature": self.curvature})


@dataclass(frozen=True, eq=False)
class RepairedWeight:
    """A layer with its low rank added."""

    layer: RepairedLayer
    digest: str  # of the repaired weight
    notes: list[str]
    parameter: Tensor  # the repaired weight as the module keeps it
    factors: LowRankCode


class LayerRepairs:
    """Repairs of the layers of a pair, one after another."""

    def __init__(self, pair: Pair, request: RepairRequest) -> None:
        self._pair, self._request = pair, request
        self._names = {layer.name for layer in pair.layers}
        self._solver = LayerSolver()

    def of_block(self, layers: Layers, clock: Clock) -> list[RepairedWeight]:
        """Repair the layers of a loaded block; return those that lacked anything."""
        repaired = []
        for layer, statistics in layers:
            if layer.name in self._names:
                with clock.phase("solve"):
                    weight = self.of_layer(layer, dict(statistics))
                repaired += [] if weight is None else [weight]
        return repaired

    def of_layer(self, layer: Layer, statistics: Mapping[str, Any]) -> RepairedWeight | None:
        """Solve for one layer's factors, and put the sum in its place; None if the layer lacks nothing."""
        name, dense = layer.name, self._request.format == "dense"
        target, present = self._pair.weights(layer)
        lacking = target - present
        if not lacking.any():
            return None
        constraint = LowRank(self._request.rank, dtype=torch.float32 if dense else self._pair.dtype(name))
        problem = LayerProblem(name, lacking, statistics, self._request.rule(), constraint)
        solved, gram = self._solver.solve(problem), problem.gram
        # As a reader multiplies them: on the CPU, since another device rounds its sums otherwise.
        code: LowRankCode = solved.solution.encoded
        left, right = (factor.cpu().contiguous() for factor in (code.left, code.right))
        stored = present.cpu() + left @ right
        repaired = (stored.to(self._pair.dtype(name)).float() if dense else stored).to(target)
        layer.replace(repaired)
        whole = 2 * gram.quadratic(target)  # E‖W x‖²
        factor = output_factor(statistics) if gram.tokens else None
        before, after = effect(lacking, gram, factor), effect(repaired - target, gram, factor)
        report = RepairedLayer(
            name=name,
            shape=(target.shape[0], target.shape[1]),
            method=solved.method,
            tokens=gram.tokens,
            damping=solved.damping,
            predicted_before=before.loss_increase,
            predicted_after=after.loss_increase,
            output_error_before=before.squared_error / whole if whole > 0 else None,
            output_error_after=after.squared_error / whole if whole > 0 else None,
        )
        return RepairedWeight(report, digest(repaired), solved.notes, layer.parameter, LowRankCode(left, right))

    def workspace(self, layer: Layer, samples: int) -> int:
        """Return the bytes that repairing a layer with `samples` probes holds, both of its weights included."""
        rule, shape = self._request.rule(), layer.weight.shape
        needs = rule.kind.needs | {"inputs"}
        return 8 * shape.numel() + layer_bytes(rule, LowRank(self._request.rank), shape, needs, samples)
