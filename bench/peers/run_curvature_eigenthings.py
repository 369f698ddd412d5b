"""hessian-eigenthings' part of the curvature benchmark."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from curvature_common import Meter, run
from curvature_models import Problem
from hessian_eigenthings import HessianOperator, hutchinson
from torch import Tensor, nn


def operator(problem: Problem) -> HessianOperator:
    """The Hessian of the mean loss, by its default: backward over backward."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())

    return HessianOperator(problem.model, problem.batches, loss)


def hessian(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Products with one vector."""
    curvature, (vector,) = operator(problem), problem.vectors(1)
    meter.begin()
    meter.products("product", lambda: curvature.matvec(vector))
    return {"product": curvature.matvec(vector)}


def trace(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Hutchinson's estimate."""
    curvature = operator(problem)
    meter.begin()
    meter.estimate("trace", lambda probes: hutchinson(curvature, num_samples=probes, seed=0))
    return {}


def agreement(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """A product."""
    meter.begin()
    return {"Hessian product": operator(problem).matvec(problem.vectors(1)[0])}


if __name__ == "__main__":
    run(version("hessian-eigenthings"), {"hessian": hessian, "trace": trace, "agreement": agreement})
