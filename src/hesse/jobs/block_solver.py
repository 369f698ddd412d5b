"""The layers of one block: solved, put in their places, and written."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from hesse.estimation.calibrated import Layers, LayerStatistics
from hesse.estimation.statistics.output_factor import output_factor
from hesse.jobs.plan import Plan
from hesse.layerwise.input_rounding import rounding_cost
from hesse.layerwise.layer_report import layer_report
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, digest
from hesse.layerwise.report import LayerReport
from hesse.networks.network import Block, Layer
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
    """Solve one block after another by a plan.

    Several `processes` solve each block together.
    """

    def __init__(
        self,
        plan: Plan,
        clock: Clock,
        processes: Processes = ALONE,
    ) -> None:
        self.plan, self.clock = plan, clock
        self.processes, self.solver = processes, LayerSolver(processes)

    def solve(self, block: Block, layers: Layers) -> tuple[BlockResult, dict[str, Tensor]]:
        """Solve the `layers` of a loaded block; return its tensors as the format stores them."""
        result = BlockResult()
        tensors: dict[str, Tensor] = {}
        for layer, statistics in layers:
            if self.plan.rules.get(layer.name) is not None:
                tensors.update(self.solve_layer(layer, statistics, result))
        with self.clock.phase("write"):
            for name in self.plan.network.stored_in(block):
                layer_name, _, kind = name.rpartition(".")
                if layer_name not in result.digests or kind not in ("weight", "bias"):
                    tensors.update(self.plan.checkpoint.read_stored([name]))
        return result, tensors

    def solve_layer(self, layer: Layer, statistics: LayerStatistics, result: BlockResult) -> dict[str, Tensor]:
        """Solve one layer, put the solution in its place, and return the tensors to write for it."""
        rule, constraint = self.plan.rules[layer.name], self.plan.format.constraint(layer.name)
        assert rule is not None and constraint is not None
        with self.clock.phase("solve"):
            problem = LayerProblem(layer.name, layer.weight.float(), dict(statistics), rule, constraint)
            solved = self.solver.solve(problem)
            encoded = solved.solution.encoded
            stored = self.plan.format.as_stored(layer.name, encoded, solved.solution.weight)
            layer.replace(stored)
        result.notes += solved.notes
        with self.clock.phase("predict"):
            report, notes = layer_report(problem, solved, stored, self.plan.format.stored_bits(layer.name))
            if rule.input_bits is not None:
                cost, factor, peak = None, output_factor(problem.statistics), problem.statistics.get("input peaks")
                if factor is not None and peak is not None:
                    cost = rounding_cost(stored, factor, peak, rule.input_bits)
                else:
                    notes.append(f"{layer.name}: the prediction leaves out that its inputs are rounded")
                report = replace(report, input_bits=rule.input_bits, predicted_input_loss=cost)
            result.layers.append(report)
            result.notes += notes
        with self.clock.phase("write"):
            result.digests[layer.name] = digest(stored)
            bias_name = f"{layer.name}.bias"
            stored_bias = [bias_name] if bias_name in self.plan.checkpoint.shard_of else []
            bias = self.plan.checkpoint.read_stored(stored_bias).get(bias_name)
            return self.plan.format.tensors(layer.name, encoded, stored, bias)
