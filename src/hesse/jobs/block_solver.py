"""The layers of one block: solved, put in their places, and written."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from hesse.estimation.calibrated import Layers, LayerStatistics
from hesse.jobs.plan import Plan
from hesse.layerwise.layer_solver import LayerSolver, digest
from hesse.layerwise.report import LayerReport
from hesse.layerwise.solved_layer import solve_layer
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
        rule = self.plan.rules[layer.name]
        assert rule is not None
        solved = solve_layer(layer, statistics, rule, self.plan.format, self.solver, self.clock)
        result.notes += solved.notes
        result.layers.append(solved.report)
        with self.clock.phase("write"):
            result.digests[layer.name] = digest(solved.stored)
            bias_name = f"{layer.name}.bias"
            stored_bias = [bias_name] if bias_name in self.plan.checkpoint.shard_of else []
            bias = self.plan.checkpoint.read_stored(stored_bias).get(bias_name)
            return self.plan.format.tensors(layer.name, solved.encoded, solved.stored, bias)
