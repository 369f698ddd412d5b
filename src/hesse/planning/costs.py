"""What each offer of a menu would cost: every layer solved alone, on what the dense model gives it."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hesse.constraints import Constraint, Grid
from hesse.curvature import Gram, Kronecker
from hesse.data import Samples
from hesse.data.selection import Calibration, Selection
from hesse.estimation import Statistics
from hesse.estimation.calibrated import calibrated_blocks
from hesse.estimation.probe import probe
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, effect
from hesse.networks.network import Layer, Network
from hesse.passes.loading import each_loaded
from hesse.passes.stream import calibration_batch, start
from hesse.planning.menu import LayerGroup
from hesse.progress import Clock, Progress
from hesse.scores.sensitivities import Sensitivity

MOST_SAMPLES = 32  # to calibrate on: which layer costs more is settled sooner than what its weights should be
SOLVED_BITS = 4  # finer grids are not solved: their loss follows from this one's, as the square of the step


class CostMeter:
    """Nats per token that each offer costs alone, summed over its group's layers as these come by.

    A layer's cost is ½ dᵀ(G ⊗ E[xxᵀ])d of the change d that the offer's rule makes of it, with the Gram E[xxᵀ] of its
    inputs and the output factor G of the dense model. With a `sensitivity` nothing is solved: d is what rounding to the
    nearest member does, and all that counts of G ⊗ E[xxᵀ] is one number. Layers that no token reached cost nothing, and
    are noted.
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
    ) -> None:
        """Take samples through the model, in the type that calibration runs in.

        Raises:
            HesseError: the data cannot be used, or a layer cannot be solved.
        """
        progress.begin("probe the loss", 2 * len(network.blocks) + 1)
        whole = [name for name, group in self._group_of.items() if self.needs_output_factor(group)]
        with tempfile.TemporaryDirectory() as folder:
            probes, seed, step = selected.probes, calibration.seed, progress.advance
            factors = probe(network, probes, whole, Path(folder), seed, Clock(), step)
            samples = selected.samples.first(MOST_SAMPLES)
            self._solve_all(network, samples, calibration, factors, progress)

    def needs_output_factor(self, group: LayerGroup) -> bool:
        """Whether all of E[ggᵀ] at the outputs of the group's layers is needed, and not its diagonal alone."""
        return group.needs_output_factor if self.sensitivity is None else self.sensitivity.eigenvalues

    def _solve_all(
        self,
        network: Network,
        samples: Samples,
        calibration: Calibration,
        factors: Mapping[str, Tensor],
        progress: Progress,
    ) -> None:
        """Solve each layer for every offer, on the inputs that it has in the dense model."""
        progress.begin("solve for each choice", len(network.blocks))
        length = samples.longest
        batches = start(network, samples.batches(calibration.batch_size or calibration_batch(length)))
        needs = dict.fromkeys(self._group_of, ("inputs",))
        for _, layers in calibrated_blocks(network, batches, needs):
            for layer, statistics in layers:
                if layer.name in self._group_of:
                    self._add(layer, statistics.gram, factors.get(layer.name))
            progress.advance()

    def read(self, network: Network, statistics: Statistics, progress: Progress) -> None:
        """Take Grams and output factors from statistics in place of samples.

        Raises:
            HesseError: the statistics cannot be read, or a layer cannot be solved.
        """
        progress.begin("solve for each choice", len(network.blocks))
        for _, block in each_loaded(network):
            for layer in (layer for layer in block.layers if layer.name in self._group_of):
                kronecker = statistics.kronecker(layer.name, network.device)
                factor = statistics.sensitivities.get(layer.name)
                gram = statistics.gram(layer.name, network.device)
                self._add(layer, gram, factor if kronecker is None else kronecker.output_factor)
            progress.advance()

    def _add(self, layer: Layer, gram: Gram | None, output_factor: Tensor | None) -> None:
        group = self._group_of[layer.name]
        if gram is None or not gram.tokens or output_factor is None:
            self.notes.append(f"{layer.name}: no token reached it, so that the plan takes it to cost nothing")
            return
        if self.sensitivity is not None:
            self._add_ranked(group, layer, gram, output_factor, self.sensitivity)
            return
        weight = layer.weight.float()
        found: dict[Constraint, float] = {}  # of this layer
        for place, offer in enumerate(group.offers):
            constraint = offer.constraints[layer.name]
            if offer.rule is None or constraint is None:
                continue
            solved, share = _coarser(constraint)
            if solved not in found:
                problem = LayerProblem(layer.name, weight, gram, output_factor, offer.rule, solved)
                solution = self._solver.solve(problem).solution
                change = solution.weight - weight
                increase = effect(change, gram, output_factor).loss_increase
                found[solved] = max(increase or 0.0, 0.0)  # below zero by rounding
            self.costs[group.name][place] += share * found[solved]

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
    """The grid that is solved in place of a finer one, and the finer one's loss as a share of its loss."""
    if not isinstance(constraint, Grid) or constraint.bits <= SOLVED_BITS:
        return constraint, 1.0
    coarse = replace(constraint, bits=SOLVED_BITS)
    return coarse, (coarse.levels / constraint.levels) ** 2
