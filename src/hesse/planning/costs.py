"""Measure the cost of each offer of a menu by solving every layer alone, on its inputs in the dense model."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hesse.checkpoints.tensor_store import TensorStore
from hesse.constraints import Constraint, Grid
from hesse.curvature import Gram, Kronecker
from hesse.data.selection import Calibration, Selection
from hesse.estimation import Statistics
from hesse.estimation.calibrated import Layers, calibrated_blocks, stored_blocks
from hesse.estimation.probe import probe
from hesse.estimation.statistics.output_factor import output_factor
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, effect
from hesse.networks.network import Block, Layer, Network
from hesse.passes.stream import calibration_batch, start
from hesse.planning.menu import LayerGroup
from hesse.progress import Clock, Progress
from hesse.scores.sensitivities import Sensitivity

MOST_SAMPLES = 32  # calibration samples: comparing layers needs fewer than solving them
SOLVED_BITS = 4  # finer grids are not solved: their loss is this one's, scaled with the square of the step


class CostMeter:
    """Meter of each offer's cost in nats per token, summed over the layers of its group.

    A layer's cost is ½ dᵀ(G ⊗ E[xxᵀ])d for the change d by the offer's rule, with the Gram E[xxᵀ] of its inputs and the
    output factor G of the dense model. With a `sensitivity` nothing is solved: d is the change by rounding to the
    nearest member, and one number replaces G ⊗ E[xxᵀ]. Layers that no token reached cost nothing, and get a note.
    """

    def __init__(self, menu: list[LayerGroup], sensitivity: Sensitivity | None = None) -> None:
        self.sensitivity = sensitivity
        self.costs = {group.name: [0.0] * len(group.offers) for group in menu}
        self.notes: list[str] = []
        self._group_of = {layer.name: group for group in menu for layer in group.layers}
        self._solver = LayerSolver()

    def measure(
        self,
        network: Network,
        selected: Selection,
        calibration: Calibration,
        progress: Progress,
        offload: Path | None = None,
    ) -> None:
        """Measure all costs on samples that pass through the model, in the type that calibration runs in.

        With a folder `offload`, the hidden states and activations of batches that wait are in files there.

        Raises:
            HesseError: the data cannot be used, or a layer cannot be solved.
        """
        progress.begin("probe the loss", 2 * len(network.blocks) + 1)
        with tempfile.TemporaryDirectory() as folder:
            probes, seed, step = selected.probes, calibration.seed, progress.advance
            factors = probe(network, probes, self.needs, Path(folder), seed, Clock(), step)
            samples = selected.samples.first(MOST_SAMPLES)
            size = calibration.batch_size or calibration_batch(samples.longest)
            batches = start(network, samples.batches(size), TensorStore(offload, "plan"))
            blocks = calibrated_blocks(network, batches, self.needs, known=factors, offload=offload)
            self._add_blocks(network, blocks, progress)

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """Return the statistics that each layer needs: the Gram of its inputs, the output factor or its diagonal."""
        return {
            name: ("inputs", "output factor" if self._whole_factor(group) else "output diagonal")
            for name, group in self._group_of.items()
        }

    def _whole_factor(self, group: LayerGroup) -> bool:
        return group.needs_output_factor if self.sensitivity is None else self.sensitivity.eigenvalues

    def read(self, network: Network, folder: Statistics, progress: Progress) -> None:
        """Measure all costs with Grams and output factors from a folder of `hesse estimate`.

        Raises:
            HesseError: the statistics cannot be read, or a layer cannot be solved.
        """
        self._add_blocks(network, stored_blocks(network, folder, self.needs), progress)

    def _add_blocks(self, network: Network, blocks: Iterator[tuple[Block, Layers]], progress: Progress) -> None:
        """Add the costs of each layer, on the inputs that it has in the dense model."""
        progress.begin("solve for each choice", len(network.blocks))
        for _, layers in blocks:
            for layer, statistics in layers:
                if layer.name in self._group_of:
                    self._add(layer, statistics.gram, output_factor(statistics))
            progress.advance()

    def _add(self, layer: Layer, gram: Gram, output_factor: Tensor | None) -> None:
        group = self._group_of[layer.name]
        if not gram.tokens or output_factor is None:
            self.notes.append(f"{layer.name}: no token reached it; the plan assumes that it costs nothing")
            return
        if self.sensitivity is not None:
            self._add_ranked(group, layer, gram, output_factor, self.sensitivity)
            return
        weight = layer.weight.float()
        statistics = {"inputs": gram, "output factor" if output_factor.ndim == 2 else "output diagonal": output_factor}
        increases: dict[Constraint, float] = {}  # of this layer
        for place, offer in enumerate(group.offers):
            constraint = offer.constraints[layer.name]
            if offer.rule is None or constraint is None:
                continue
            solved, share = _coarser(constraint)
            if solved not in increases:
                problem = LayerProblem(layer.name, weight, statistics, offer.rule, solved)
                solution = self._solver.solve(problem).solution
                change = solution.weight - weight
                increase = effect(change, gram, output_factor).loss_increase
                increases[solved] = max(increase or 0.0, 0.0)  # rounding errors may make it negative
            self.costs[group.name][place] += share * increases[solved]

    def _add_ranked(
        self, group: LayerGroup, layer: Layer, gram: Gram, output_factor: Tensor, sensitivity: Sensitivity
    ) -> None:
        weight = layer.weight.float()
        kronecker = Kronecker(output_factor=output_factor.float(), input_factor=gram.second_moment.float())
        half = 0.5 * sensitivity.coefficient([kronecker])
        for place, offer in enumerate(group.offers):
            constraint = offer.constraints[layer.name]
            if constraint is not None:
                change = constraint.nearest(weight) - weight
                self.costs[group.name][place] += half * float(change.double().square().sum())


def _coarser(constraint: Constraint) -> tuple[Constraint, float]:
    """Return the grid that is solved in place of a finer one, and the finer grid's loss as a share of its loss."""
    if not isinstance(constraint, Grid) or constraint.bits <= SOLVED_BITS:
        return constraint, 1.0
    coarse = replace(constraint, bits=SOLVED_BITS)
    return coarse, (coarse.levels / constraint.levels) ** 2
