"""`hesse inspect`: is this a minimum, how curved is it, where, and whose prediction of that holds."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hesse.curvature import CrossEntropy, Diagonal, GaussNewton, Hessian, Objective
from hesse.data import Samples, read_samples
from hesse.errors import UnsupportedModelError
from hesse.estimation import eigen_kronecker, fisher_diagonal, kronecker_factors
from hesse.evaluation.evaluate import check_ids
from hesse.evaluation.metrics import Totals
from hesse.formats import open_checkpoint
from hesse.inspection.layers import SCHEMES, LayerInspection, inspect_layer, rank_correlations
from hesse.models.network import Network
from hesse.progress import Clock, Progress
from hesse.solvers import Eigenpairs, Estimate, Spectrum, hutch_plus_plus, lanczos, spectral_density

LANCZOS_PRODUCTS = 25  # for both ends of the spectrum
TRACE_PRODUCTS = 15
DENSITY_PROBES, DENSITY_STEPS = 2, 12
IGNORED = -100


@dataclass(frozen=True)
class Inspection:
    """A model's loss around its weights, over the linear layers of its blocks. Losses in nats per token."""

    model: str
    samples: int
    tokens: int
    parameters: int
    loss: float
    gradient_norm: float
    largest_eigenvalue: tuple[float, float]  # of the Hessian, and its residual: a true one lies so near
    smallest_eigenvalue: tuple[float, float]
    spectrum: list[tuple[float, float]]  # eigenvalues of the Hessian, and how many a probe sees about there
    trace: tuple[float, float]  # of the Gauss-Newton matrix, and its standard error
    layers: list[LayerInspection]
    rank_correlations: dict[str, dict[str, float]]  # scheme: curvature: Spearman's with what was measured
    seconds: dict[str, float]

    @property
    def at_a_minimum(self) -> bool:
        """Whether no direction of negative curvature beyond the residual was met."""
        value, residual = self.smallest_eigenvalue
        return value >= -residual

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {**asdict(self), "at_a_minimum": self.at_a_minimum}


def inspect_checkpoint(
    model: Path,
    name: str,
    data: str | Path | list[list[int]] | None,
    samples: int,
    length: int,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Inspection:
    """Inspect the causal language model in the folder `model`, in float32 and wholly in memory.

    Raises:
        UnsupportedModelError: it has no next-token loss, or no linear layers of its own kind.
        HesseError: the model or the data cannot be used.
    """
    clock = Clock()
    with clock.phase("read"):
        network = Network(open_checkpoint(model), torch.float32, device)
        if network.kind != "causal-lm":
            raise UnsupportedModelError(f"{model} is an encoder without a loss of its own: inspect a language model")
        limit = network.input_limit
        chosen, _ = read_samples(
            data,
            model,
            count=samples,
            length=length if limit is None else min(length, limit),
            seed=seed,
            purpose="calibration",
            limit=limit,
        )
        check_ids(network, chosen.batches(1))
    with network.whole() as whole:
        return _Inspector(network, whole, name, chosen, seed, clock, progress).run()


class _Inspector:
    """One inspection of a model in memory."""

    def __init__(
        self,
        network: Network,
        model: PreTrainedModel,
        name: str,
        samples: Samples,
        seed: int,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.name, self.seed, self.clock, self.progress = name, seed, clock, progress
        self.batches = samples.batches(1)
        self.model = model
        self.linear = {
            layer.name: layer.module
            for block in network.blocks
            for layer in block.layers
            if isinstance(layer.module, nn.Linear)
        }
        modules = {module: path for path, module in model.named_modules()}
        self.paths = {name: modules[module] for name, module in self.linear.items()}
        if not self.linear:
            raise UnsupportedModelError(f"the blocks of {type(model).__name__} hold no nn.Linear that can be inspected")
        for module in self.linear.values():
            module.weight.requires_grad_(True)
        data = [(ids, _next_tokens(ids)) for ids in self.batches]
        weights = [f"{path}.weight" for path in self.paths.values()]
        self.objective = Objective.of(model, CrossEntropy(), data, weights, forward=_logits)

    def run(self) -> Inspection:
        """Everything, in turn."""
        objective = self.objective
        self.progress.begin("estimate", 4)
        with self.clock.phase("estimate"):
            gradient = objective.gradient()
            self.progress.advance()
            factors = kronecker_factors(objective, "sampled", "position", seed=self.seed)
            self.progress.advance()
            corrected = eigen_kronecker(objective, factors, "sampled", seed=self.seed)
            self.progress.advance()
            diagonal = objective.split(fisher_diagonal(objective, "sampled", seed=self.seed).values)
            self.progress.advance()
        layers = self._layers(factors, corrected, diagonal)
        ends, trace, density = self._spectrum()
        return Inspection(
            model=self.name,
            samples=len(self.batches),
            tokens=sum(ids.numel() for ids in self.batches),
            parameters=objective.size,
            loss=objective.value(),
            gradient_norm=float(gradient.double().norm()),
            largest_eigenvalue=(float(ends.values[0]), float(ends.residuals[0])),
            smallest_eigenvalue=(float(ends.values[-1]), float(ends.residuals[-1])),
            spectrum=list(zip(density.nodes.flatten().tolist(), _counts(density), strict=True)),
            trace=(float(trace.value), float(trace.standard_error)),
            layers=layers,
            rank_correlations=rank_correlations(layers),
            seconds={"total": self.clock.total, **self.clock.seconds},
        )

    def _layers(self, factors: Any, corrected: Any, diagonal: tuple[Tensor, ...]) -> list[LayerInspection]:
        dense = [self._predict(ids) for ids in self.batches]

        def measure() -> float:
            totals = Totals()
            for ids, wanted in zip(self.batches, dense, strict=True):
                totals.add(self._predict(ids), ids, wanted)
            return totals.divergence / totals.tokens

        reached = [name for name, path in self.paths.items() if path in factors]
        self.progress.begin("change each layer", len(reached) * len(SCHEMES))
        values = dict(zip(self.paths, diagonal, strict=True))
        with self.clock.phase("measure"):
            return [
                inspect_layer(
                    name,
                    self.linear[name],
                    factors[self.paths[name]],
                    corrected[self.paths[name]],
                    Diagonal(values=values[name]),
                    measure,
                    self.progress.advance,
                )
                for name in reached
            ]

    def _predict(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return _logits(self.model, ids)

    def _spectrum(self) -> tuple[Eigenpairs, Estimate, Spectrum]:
        hessian, square = Hessian(objective=self.objective), GaussNewton(objective=self.objective)
        self.progress.begin("spectrum", 3)
        with self.clock.phase("spectrum"):
            ends = lanczos(hessian, which="both", max_products=LANCZOS_PRODUCTS, seed=self.seed)
            self.progress.advance()
            trace = hutch_plus_plus(square, TRACE_PRODUCTS, self.seed)
            self.progress.advance()
            density = spectral_density(hessian, DENSITY_PROBES, DENSITY_STEPS, self.seed)
            self.progress.advance()
        return ends, trace, density


def _counts(spectrum: Spectrum) -> list[float]:
    """Eigenvalues at each node, the mean over probes."""
    counts: list[float] = (spectrum.dimension * spectrum.weights / len(spectrum.weights)).flatten().tolist()
    return counts


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _next_tokens(ids: Tensor) -> Tensor:
    """The token after each, and nothing after the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
