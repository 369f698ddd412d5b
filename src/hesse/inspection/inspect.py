"""Inspect a model: gradient, spectrum and trace of the curvature, and the accuracy of each approximation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hesse.checkpoints.locate import locate
from hesse.curvature import CrossEntropy, Curvature, GaussNewton, Hessian, Identity, Objective
from hesse.curvature.losses import input_ids, next_tokens
from hesse.data import Samples, read_samples
from hesse.data.selection import Data
from hesse.errors import DataError, UnsupportedModelError, check_at_least
from hesse.estimation import Estimates, Statistics, eigen_kronecker, estimate_curvatures
from hesse.estimation.estimates import Name
from hesse.evaluation.metrics import PredictionTotals
from hesse.formats import open_checkpoint
from hesse.inspection.layers import SCHEMES, LayerInspection, inspect_layer, rank_correlations
from hesse.networks.device import find_device
from hesse.networks.layout import check_ids
from hesse.networks.network import CheckpointNetwork, Layer, Network
from hesse.progress import Clock, Progress, Silence
from hesse.result import Report, Result
from hesse.solvers import Eigenpairs, Estimate, Spectrum, hutch_plus_plus, lanczos, mean_of, spectral_density
from hesse.version import versions

EIGENVALUES = 3  # at each end of the spectrum
LANCZOS_PRODUCTS = 25  # for both ends
TRACE_PRODUCTS = 15
DENSITY_PROBES, DENSITY_STEPS = 2, 12


@dataclass(frozen=True, kw_only=True)
class Inspection(Report):
    """The loss around a model's weights, over the linear layers of its blocks; losses are in nats per token."""

    samples: int
    tokens: int
    parameters: int
    statistics: str | None  # the statistics folder that predictions were made from; None: from these samples
    model_loss: float
    gradient_norm: float
    largest_eigenvalues: list[tuple[float, float]]  # of the Hessian, with residuals that bound their errors
    smallest_eigenvalues: list[tuple[float, float]]
    spectrum: list[tuple[float, float]]  # eigenvalues of the Hessian, and their estimated number near each
    trace: tuple[float, float]  # of the Gauss-Newton matrix, and its standard error
    layers: list[LayerInspection]
    rank_correlations: dict[str, dict[str, float]]  # scheme: curvature: Spearman's with the measurements

    @property
    def at_a_minimum(self) -> bool:
        """True if no negative eigenvalue exceeds its residual."""
        value, residual = self.smallest_eigenvalues[0]
        return value >= -residual

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {**super().to_dict(), "at_a_minimum": self.at_a_minimum}


def inspect(
    model: str | Path,
    *,
    data: Data = None,
    statistics: str | Path | None = None,
    samples: int = 4,
    length: int = 256,
    seed: int = 0,
    bos: bool | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Result[Inspection]:
    """Inspect the loss around a language model, and measure how well each curvature predicts it.

    Each linear layer is changed alone, to 8, 4, 3 and 2 bits and to half of its weights zero, and each curvature's
    prediction is compared with the measured divergence. The whole model is in memory, in float32.

    Args:
        model: a model folder, `default`, or a hub id; dense.
        data: as for `compress`; None for the shipped calibration text.
        statistics: a folder that `estimate` wrote, for predictions; None to predict from these samples.
        samples: number of windows.
        length: tokens per window, at most the model's positions.
        seed: for the choice of samples, sampled labels and random vectors.
        bos: start windows of text with BOS, or not; None for what the tokenizer does.
        device: `auto`, `cpu`, or `cuda`.
        progress: receives each phase and step.

    Raises:
        UnsupportedModelError: the model has no next-token loss, or no linear layers that Hesse supports.
        HesseError: the subclass and message say what is wrong and what to do.
    """
    check_at_least("--samples", samples, 2)
    check_at_least("--length", length, 2)
    check_at_least("--seed", seed, 0)
    clock, folder, progress = Clock(), locate(model), progress or Silence()
    with clock.phase("read"):
        checkpoint = open_checkpoint(folder)
        stored = None if statistics is None else Statistics(Path(statistics))
        if stored is not None:
            stored.check_model(checkpoint)
        network = CheckpointNetwork(checkpoint, torch.float32, find_device(device))
        if network.kind != "causal-lm":
            raise UnsupportedModelError(f"{folder} is an encoder without a loss of its own: inspect a language model")
        limit = network.input_limit
        chosen, _ = read_samples(
            data,
            folder,
            count=samples,
            length=length if limit is None else min(length, limit),
            seed=seed,
            purpose="calibration",
            limit=limit,
            bos=bos,
        )
        if len(chosen.ids) < 2:
            raise DataError(f"{chosen.source} gives one sample, and the spread of two is needed: use more text")
        check_ids(network.model, chosen.batches(1))
    with network.whole() as whole:
        return Result(_Inspector(network, whole, str(model), stored, chosen, seed, clock, progress).run())


class _Inspector:
    """Inspection of one model in memory."""

    def __init__(
        self,
        network: Network,
        model: PreTrainedModel,
        name: str,
        statistics: Statistics | None,
        samples: Samples,
        seed: int,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.statistics, self.device = statistics, network.device
        self.name, self.seed, self.clock, self.progress = name, seed, clock, progress
        self.batches = [(input_ids(ids), next_tokens(ids)) for ids in samples.batches(1)]
        self.notes = list(samples.notes)
        self.model = model
        self.layers = {layer.name: layer for block in network.blocks for layer in block.layers}
        modules = {module: path for path, module in model.named_modules()}
        self.parameters = {name: f"{modules[layer.module]}.weight" for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.parameter.requires_grad_(True)
        weights = list(self.parameters.values())
        self.objective = Objective.of(model, CrossEntropy(), self.batches, weights, forward=_logits)

    def run(self) -> Inspection:
        """Run all parts of the inspection."""
        objective = self.objective
        self.progress.begin("estimate", 3)
        with self.clock.phase("estimate"):
            gradient = objective.gradient()
            self.progress.advance()
            parts = zip(objective.names, objective.split(gradient), strict=True)
            reached = [name for name, own in parts if bool(own.any())]
            part = Objective.of(self.model, objective.loss, objective.data, reached, objective.forward)
            kinds: tuple[Name, ...] = ("gram", "kronecker", "fisher") if self.statistics is None else ("fisher",)
            estimates = estimate_curvatures(part, kinds, seed=self.seed)
            self.progress.advance()
            eigen_corrected = eigen_kronecker(part, estimates.kronecker, seed=self.seed) if estimates.kronecker else {}
            self.progress.advance()
        layers = self._layers(estimates, eigen_corrected, part.scale)
        ends, trace, density = self._spectrum()
        pairs = list(zip(ends.values.tolist(), ends.residuals.tolist(), strict=True))
        return Inspection(
            verb="inspect",
            model=self.name,
            samples=len(self.batches),
            tokens=sum(ids.numel() for ids, _ in self.batches),
            parameters=objective.size,
            statistics=None if self.statistics is None else str(self.statistics.folder),
            model_loss=objective.value(),
            gradient_norm=float(gradient.double().norm()),
            largest_eigenvalues=pairs[:EIGENVALUES],
            smallest_eigenvalues=pairs[EIGENVALUES:],
            spectrum=list(zip(density.nodes.flatten().tolist(), _counts(density), strict=True)),
            trace=(float(trace.value), float(trace.standard_error)),
            layers=layers,
            rank_correlations=rank_correlations(layers),
            notes=self.notes,
            seconds={"total": self.clock.total, **self.clock.seconds},
            versions=versions(),
        )

    def _layers(self, estimates: Estimates, eigen_corrected: dict[str, Any], scale: float) -> list[LayerInspection]:
        """Change each layer that the data reaches, one at a time."""
        dense = [self._predict(ids) for ids, _ in self.batches]

        def measure() -> tuple[float, float]:
            totals = PredictionTotals()
            for (ids, targets), expected in zip(self.batches, dense, strict=True):
                totals.add(self._predict(ids), targets, expected)
            mean = totals.mean_divergence()
            return mean.value, mean.standard_error

        inspected = []
        reached = [layer for name, layer in self.layers.items() if self.parameters[name] in estimates.fisher]
        self.progress.begin("change each layer", len(reached) * len(SCHEMES))
        with self.clock.phase("measure"):
            for layer in reached:
                name = self.parameters[layer.name]
                curvatures = self._curvatures(layer, estimates, eigen_corrected)
                norms = estimates.squared_norms[name]
                trace = mean_of(norms.double() * (scale * len(norms)))
                inspected.append(inspect_layer(layer, curvatures, trace, measure, self.progress.advance))
        return inspected

    def _curvatures(self, layer: Layer, estimates: Estimates, eigen_corrected: dict[str, Any]) -> dict[str, Curvature]:
        """Return a layer's curvatures: estimated here, or read from the statistics."""
        name, statistics = self.parameters[layer.name], self.statistics
        if statistics is None:
            return {
                "identity": Identity(),
                "gram": estimates.gram[name],
                "fisher diagonal": estimates.fisher[name],
                "kronecker": estimates.kronecker[name],
                "eigen-kronecker": eigen_corrected[name],
            }
        stored: dict[str, Curvature | None] = {
            "identity": Identity(),
            "gram": statistics.gram(layer.name, self.device),
            "fisher diagonal": statistics.fisher(layer.name, self.device),
            "kronecker": statistics.kronecker(layer.name, self.device),
        }
        return {kind: curvature for kind, curvature in stored.items() if curvature is not None}

    def _predict(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return _logits(self.model, ids)

    def _spectrum(self) -> tuple[Eigenpairs, Estimate, Spectrum]:
        hessian, square = Hessian(objective=self.objective), GaussNewton(objective=self.objective)
        self.progress.begin("spectrum", 3)
        with self.clock.phase("spectrum"):
            ends = lanczos(hessian, EIGENVALUES, which="both", max_products=LANCZOS_PRODUCTS, seed=self.seed)
            self.progress.advance()
            trace = hutch_plus_plus(square, TRACE_PRODUCTS, self.seed)
            self.progress.advance()
            density = spectral_density(hessian, DENSITY_PROBES, DENSITY_STEPS, self.seed)
            self.progress.advance()
        return ends, trace, density


def _counts(spectrum: Spectrum) -> list[float]:
    """Return the number of eigenvalues at each node, averaged over probes."""
    return cast(list[float], (spectrum.dimension * spectrum.weights / len(spectrum.weights)).flatten().tolist())


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return cast(Tensor, model(input_ids=ids, use_cache=False).logits)
