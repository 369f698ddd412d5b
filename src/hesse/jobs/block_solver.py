"""The layers of one block: solved, put in their places, and written."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hesse.curvature import Gram
from hesse.estimation import GramAccumulator, Statistics
from hesse.estimation.attention_factors import attention_factors
from hesse.estimation.inputs import InputGrams
from hesse.estimation.position_weights import position_weights
from hesse.estimation.weight_fisher import name_of
from hesse.jobs.plan import Plan
from hesse.layerwise.input_rounding import rounding_cost
from hesse.layerwise.layer_report import layer_report
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, digest
from hesse.layerwise.report import LayerReport
from hesse.layerwise.rules import attention_outputs, weighted_inputs
from hesse.networks.network import Block, Layer
from hesse.passes.stream import StreamBatch, advance_with_stops
from hesse.processes import ALONE, Processes
from hesse.progress import Clock


@dataclass(eq=False)
class BlockResult:
    """What became of a block's layers."""

    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # of each solved weight

    def add(self, other: "BlockResult") -> None:
        """Add the result of another block."""
        self.layers += other.layers
        self.notes += other.notes
        self.digests |= other.digests

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "BlockResult":
        """A result from what `to_dict` gave."""
        layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in content["layers"]]
        return cls(layers, content["notes"], content["digests"])


class BlockSolver:
    """Solves one block after another by a plan; `sensitivities` are what the loss feels of the layers' outputs.

    With a folder `paused`, what a block holds for samples that wait is in files there. Several `processes` solve each
    block together.
    """

    def __init__(
        self,
        plan: Plan,
        sensitivities: Mapping[str, Tensor],
        clock: Clock,
        paused: Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.plan, self.sensitivities, self.clock, self.paused = plan, sensitivities, clock, paused
        self.processes, self.solver = processes, LayerSolver(processes)
        self.result = BlockResult()

    def solve(self, index: int, block: Block, flows: list[StreamBatch]) -> tuple[BlockResult, dict[str, Tensor]]:
        """Solve the layers of a block and take `flows` through it; return its tensors as the format stores them."""
        self.result = BlockResult()
        tensors: dict[str, Tensor] = {}
        with self.clock.phase("read"), self.plan.network.loaded(block):
            if self.plan.statistics is None:
                missed = self._on_the_way(index, block, flows, tensors)
            else:
                missed = self._from_statistics(block, self.plan.statistics, tensors)
            for layer in missed:
                if self.plan.rules.get(layer.name) is not None:
                    empty = GramAccumulator(layer.name, layer.weight.shape[1], self.plan.network.device).gram()
                    tensors.update(self._solve(layer, empty))
        with self.clock.phase("write"):
            for name in self.plan.network.stored_in(block):
                layer_name, _, kind = name.rpartition(".")
                if layer_name not in self.result.digests or kind not in ("weight", "bias"):
                    tensors.update(self.plan.checkpoint.read_stored([name]))
        return self.result, tensors

    def _on_the_way(
        self, index: int, block: Block, flows: list[StreamBatch], tensors: dict[str, Tensor]
    ) -> list[Layer]:
        """Solve layers on what all that is compressed before them now gives; the layers that no sample reached."""
        rounded = any(rule is not None and rule.input_bits for rule in self.plan.rules.values())
        weights = None
        if weighted_inputs(self.plan.rules).intersection(layer.name for layer in block.layers):
            with self.clock.phase("calibrate"):
                weights = position_weights(flows, block, index)
        attention: dict[str, Tensor] = {}
        if attention_outputs(self.plan.rules).intersection(layer.name for layer in block.layers):
            with self.clock.phase("estimate"):
                attention = attention_factors(flows, block, index, self.processes)
        grams = InputGrams(self.clock, self.processes, with_peaks=rounded, weights=weights)

        def change(layer: Layer) -> None:
            gram = grams.gram()  # of an ignored layer too: it ends what was collected
            if self.plan.rules.get(layer.name) is not None:
                tensors.update(self._solve(layer, gram, grams.square_peak(), grams.weighted, attention.get(layer.name)))

        with self.clock.phase("calibrate"):
            return advance_with_stops(flows, block, index, grams.collect, change, self.paused)

    def _from_statistics(self, block: Block, statistics: Statistics, tensors: dict[str, Tensor]) -> list[Layer]:
        """Solve layers on what the dense model gave; the layers that no sample reached then."""
        missed = []
        for layer in block.layers:
            if self.plan.rules.get(layer.name) is None:
                continue
            with self.clock.phase("estimate"):
                gram = statistics.gram(layer.name, self.plan.network.device)
            if gram is None:
                missed.append(layer)
            else:
                tensors.update(self._solve(layer, gram))
        return missed

    def _solve(
        self,
        layer: Layer,
        gram: Gram,
        square_peak: float | None = None,
        weighted: Gram | None = None,
        attention: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Solve one layer, put the result in its place, and return the tensors to write for it.

        `square_peak` is E[max|x|²] over its inputs, `weighted` their Gram with weights of positions, `attention`
        what the output of its attention feels of its outputs, where known.
        """
        rule, constraint = self.plan.rules[layer.name], self.plan.format.constraint(layer.name)
        assert rule is not None and constraint is not None
        with self.clock.phase("solve"):
            weight, sensitivity = layer.weight.float(), self._output_factor(layer.name)
            fisher = self._fisher(layer) if rule.needs_fisher else None
            problem = LayerProblem(layer.name, weight, gram, sensitivity, rule, constraint, fisher, weighted, attention)
            solved = self.solver.solve(problem)
            encoded = solved.solution.encoded
            stored = self.plan.format.as_stored(layer.name, encoded, solved.solution.weight)
            layer.replace(stored)
        self.result.notes += solved.notes
        with self.clock.phase("predict"):
            report, notes = layer_report(problem, solved, stored, self.plan.format.stored_bits(layer.name))
            if rule.input_bits is not None:
                cost = None
                if sensitivity is not None and square_peak is not None:
                    cost = rounding_cost(stored, sensitivity, square_peak, rule.input_bits)
                else:
                    notes.append(f"{layer.name}: the prediction leaves out that its inputs are rounded")
                report = replace(report, input_bits=rule.input_bits, predicted_input_loss=cost)
            self.result.layers.append(report)
            self.result.notes += notes
        with self.clock.phase("write"):
            self.result.digests[layer.name] = digest(stored)
            bias_name = f"{layer.name}.bias"
            stored_bias = [bias_name] if bias_name in self.plan.checkpoint.shard_of else []
            bias = self.plan.checkpoint.read_stored(stored_bias).get(bias_name)
            return self.plan.format.tensors(layer.name, encoded, stored, bias)

    def _output_factor(self, layer: str) -> Tensor | None:
        """What the loss feels of a layer's outputs: all of G (out, out) where it was estimated before, else E[g²]."""
        if self.plan.statistics is not None:
            kronecker = self.plan.statistics.kronecker(layer, self.plan.network.device)
            if kronecker is not None:
                return kronecker.output_factor
        return self.sensitivities.get(layer)

    def _fisher(self, layer: Layer) -> Tensor | None:
        """The Fisher on a layer's weight: its diagonal (out, in), blocks (blocks, size, size) or gradients."""
        if self.plan.statistics is None:
            return self.sensitivities.get(name_of(layer))
        found = self.plan.statistics.fisher(layer.name, self.plan.network.device)
        if found is None:
            return None
        return found.values.T if layer.transposed else found.values
