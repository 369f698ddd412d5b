"""Solve the layers of one block, set their weights, and return the tensors to write."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from hesse.estimation.calibrated import Layers, LayerStatistics
from hesse.jobs.setup import Setup
from hesse.layerwise.layer_solver import LayerSolver
from hesse.layerwise.solved_layer import LayerReport, digest, solve_layer
from hesse.networks.network import Block, Layer
from hesse.processes import ALONE, Processes
from hesse.progress import Clock


@dataclass(eq=False)
class BlockResult:
    """Results of a block's layers."""

    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # of each solved weight

    def add(self, other: "BlockResult") -> None:
        """Add the result of another block."""
        self.layers += other.layers
        self.notes += other.notes
        self.digests |= other.digests

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "BlockResult":
        """Return the result that `to_dict` described."""
        layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in content["layers"]]
        return cls(layers, content["notes"], content["digests"])


class BlockSolver:
    """Solve one block after another as a Setup says.

    Several `processes` solve each block together.
    """

    def __init__(
        self,
        setup: Setup,
        clock: Clock,
        processes: Processes = ALONE,
    ) -> None:
        self.setup, self.clock = setup, clock
        self.processes, self.solver = processes, LayerSolver(processes)

    def solve(self, block: Block, layers: Layers) -> tuple[BlockResult, dict[str, Tensor]]:
        """Solve the `layers` of a loaded block; return its tensors as the format stores them."""
        result = BlockResult()
        tensors: dict[str, Tensor] = {}
        for layer, statistics in layers:
            if self.setup.rules.get(layer.name) is not None:
                tensors.update(self.solve_layer(layer, statistics, result))
        with self.clock.phase("write"):
            for key in self.setup.network.stored_in(block):
                layer_name, _, kind = key.rpartition(".")
                if len(self._parts(key)) == 1 and layer_name in result.digests and kind in ("weight", "bias"):
                    continue
                self._add_stored(key, tensors, result)
        return result, tensors

    def _parts(self, key: str) -> list[str]:
        """Return the dense tensors that the stored tensor `key`, and others that are converted with it, consist of."""
        sources = self.setup.network.tensors
        return [key] if sources.is_stored(sources.by_key[key][0]) else sources.by_key[key]

    def _add_stored(self, key: str, tensors: dict[str, Tensor], result: BlockResult) -> None:
        """Add the stored tensor `key`, or if solved layers are parts of it, what takes its place."""
        if key in tensors:
            return
        sources, format = self.setup.network.tensors, self.setup.format
        layers = {name: name.removesuffix(".weight") for name in self._parts(key) if name.endswith(".weight")}
        solved = [name for name, layer in layers.items() if layer in result.digests]
        if any(format.stands_alone(layer) for layer in layers.values()):
            written = {name for name in tensors if name in self._parts(key)}
            missing = [name for name in self._parts(key) if name not in solved and name not in written]
            tensors.update(sources.read(missing))
        elif solved and not sources.is_stored(solved[0]):
            tensors.update(sources.join_changed(key, {name: tensors.pop(name) for name in solved}))
        else:
            tensors.update(self.setup.checkpoint.read_stored([key]))

    def solve_layer(self, layer: Layer, statistics: LayerStatistics, result: BlockResult) -> dict[str, Tensor]:
        """Solve one layer, set its weight to the solution, and return the tensors to write for it."""
        rule = self.setup.rules[layer.name]
        assert rule is not None
        solved = solve_layer(layer, statistics, rule, self.setup.format, self.solver, self.clock)
        result.notes += solved.notes
        result.layers.append(solved.report)
        with self.clock.phase("write"):
            result.digests[layer.name] = digest(solved.stored)
            bias_name = f"{layer.name}.bias"
            stored_bias = [bias_name] if bias_name in self.setup.checkpoint.shard_of else []
            bias = self.setup.checkpoint.read_stored(stored_bias).get(bias_name)
            return self.setup.format.tensors(layer.name, solved.encoded, solved.stored, bias)
