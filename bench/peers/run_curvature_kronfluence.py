"""kronfluence's part of the curvature benchmark."""

from __future__ import annotations

import logging
import tempfile
from importlib.metadata import version
from typing import Any

import torch
from curvature_common import Meter, run
from curvature_models import Problem, block_layers
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor.config import FactorConfig
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

NAME = "factors"
BATCH = 16


class SummedLoss(Task):
    """The summed cross-entropy, with labels of the data or of the model."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        logits = model(inputs).flatten(0, -2)
        labels = labels.flatten()
        if sample:
            labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers


class Fit:
    """The three stages, as its Analyzer does them: with their results written to a folder and read back."""

    def __init__(self, problem: Problem, folder: str, settings: FactorArguments) -> None:
        task = SummedLoss(block_layers(problem.model))
        model = prepare_model(problem.model, task)
        self.layers = task.layers
        self.analyzer = Analyzer(
            "curvature", model, task, cpu=True, log_level=logging.ERROR, disable_tqdm=True, output_dir=folder
        )
        self.data = TensorDataset(*problem.whole())
        self.settings = settings

    def covariance(self) -> None:
        """Both factors of each layer."""
        self.analyzer.fit_covariance_matrices(
            NAME, self.data, per_device_batch_size=BATCH, factor_args=self.settings, overwrite_output_dir=True
        )

    def eigendecomposition(self) -> None:
        """Their eigenvectors."""
        self.analyzer.perform_eigendecomposition(NAME, factor_args=self.settings, overwrite_output_dir=True)

    def correction(self) -> None:
        """The eigenvalues, from each sample's gradient."""
        self.analyzer.fit_lambda_matrices(
            NAME, self.data, per_device_batch_size=BATCH, factor_args=self.settings, overwrite_output_dir=True
        )

    def storage(self) -> dict[str, dict[str, Tensor]]:
        """All of it by layer."""
        factors = self.analyzer.load_eigendecomposition(NAME) | self.analyzer.load_lambda_matrices(NAME)
        return {layer: {key: values[layer] for key, values in factors.items()} for layer in self.layers}


def ekfac(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Each stage of EK-FAC of the blocks' linear layers, and one inverse product with all of them."""
    gradients = {name: problem.gradient(f"{name}.weight")[None] for name in block_layers(problem.model)}
    meter.begin()
    meter.time("plain gradient", problem.forward_backward)
    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(problem, folder, FactorArguments(strategy="ekfac"))
        meter.time("covariance", fit.covariance)
        meter.time("eigendecomposition", fit.eigendecomposition)
        meter.time("correction", fit.correction)
        storage = fit.storage()
    config = FactorConfig.CONFIGS["ekfac"]
    for layer in fit.layers:
        config.prepare(storage[layer], ScoreArguments(damping_factor=None), torch.device("cpu"))  # 0.1 of the mean
    meter.products(
        "inverse product", lambda: [config.precondition_gradient(g, storage[name]) for name, g in gradients.items()]
    )
    return {}


def agreement(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Factors, and the product with EK-FAC, with the labels of the data.

    Its sums are divided as Hesse's are: inputs by the number of positions, gradients and eigenvalues by that of the
    loss's terms, which a convolution has fewer of.
    """
    double = {name: torch.float64 for name in ("activation_covariance_dtype", "gradient_covariance_dtype")}
    double |= {name: torch.float64 for name in ("per_sample_gradient_dtype", "lambda_dtype")}
    names = [name for name, _ in problem.model.named_parameters()]
    directions = dict(zip(names, problem.split(problem.vectors(1)[0]), strict=True))
    terms = sum(labels.numel() for _, labels in problem.batches)
    meter.begin()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(problem, folder, FactorArguments(strategy="ekfac", use_empirical_fisher=True, **double))
        fit.covariance()
        fit.eigendecomposition()
        fit.correction()
        factors, storage = fit.analyzer.load_covariance_matrices(NAME), fit.storage()
    for layer in fit.layers:
        count = factors["num_activation_covariance_processed"][layer]
        found[f"K-FAC expand, input factor/{layer}"] = factors["activation_covariance"][layer] / count
        found[f"K-FAC expand, gradient factor/{layer}"] = factors["gradient_covariance"][layer] / terms
        left, right = storage[layer]["gradient_eigenvectors"], storage[layer]["activation_eigenvectors"]
        values = storage[layer]["lambda_matrix"] / terms
        rotated = left.T @ directions[f"{layer}.weight"].flatten(1) @ right
        if not int(count) > len(fit.data):  # else expanded factors with whole samples' eigenvalues, which Hesse refuses
            found[f"EK-FAC expand, product/{layer}"] = left @ (values * rotated) @ right.T
    return found


if __name__ == "__main__":
    run(version("kronfluence"), {"ekfac": ekfac, "agreement": agreement})
