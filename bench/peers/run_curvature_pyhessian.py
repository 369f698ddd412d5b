"""PyHessian's part of the curvature benchmark."""

from __future__ import annotations

import math
from importlib.metadata import version

import torch
from curvature_common import Meter, run
from curvature_models import Problem
from pyhessian import hessian as PyHessian
from pyhessian.utils import hessian_vector_product
from torch import Tensor, nn

ONE_BATCH = "one batch"  # it then keeps the gradient's graph for all products


def made(problem: Problem, variant: str) -> PyHessian:
    """Its object, over the batches or over all data at once."""
    problem = problem.flat() if problem.batches[0][1].ndim > 1 else problem
    data = {"data": problem.whole()} if variant == ONE_BATCH else {"dataloader": problem.batches}
    return PyHessian(problem.model, nn.CrossEntropyLoss(), cuda=False, **data)


def product(curvature: PyHessian, vector: list[Tensor]) -> list[Tensor]:
    """What its own estimates call for H v."""
    if curvature.full_dataset:
        return curvature.dataloader_hv_product(vector)[1]
    return list(hessian_vector_product(curvature.gradsH, curvature.params, vector))


def hessian(problem: Problem, meter: Meter, variant: str) -> dict[str, Tensor]:
    """Products with one vector."""
    vector = problem.split(problem.vectors(1)[0])
    meter.begin()
    curvature = made(problem, variant)
    meter.products("product", lambda: product(curvature, vector))
    return {"product": torch.cat([piece.flatten() for piece in product(curvature, vector)])}


def trace(problem: Problem, meter: Meter, variant: str) -> dict[str, Tensor]:
    """Hutchinson's estimate; no tolerance is small enough to end it early."""
    meter.begin()
    meter.estimate("trace", lambda probes: made(problem, variant).trace(maxIter=probes, tol=-math.inf))
    return {}


def agreement(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """A product; it adds in the default precision."""
    torch.set_default_dtype(torch.float64)
    vector = problem.split(problem.vectors(1)[0])
    meter.begin()
    return {"Hessian product": torch.cat([p.flatten() for p in product(made(problem, ""), vector)])}


if __name__ == "__main__":
    run(version("PyHessian"), {"hessian": hessian, "trace": trace, "agreement": agreement})
