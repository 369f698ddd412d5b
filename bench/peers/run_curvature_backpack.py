"""BackPACK's part of the curvature benchmark."""

from __future__ import annotations

from importlib.metadata import version

import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact, SumGradSquared
from curvature_common import Meter, run
from curvature_models import Problem
from torch import Tensor, nn


def accumulated(problem: Problem, model: nn.Module, loss: nn.Module, extension: type, field: str) -> Tensor:
    """The sum of an extension's values over the batches of a summed loss, over the number of terms."""
    totals = [torch.zeros_like(p) for p in problem.parameters]
    terms = sum(labels.numel() for _, labels in problem.batches)
    for inputs, labels in problem.batches:
        with backpack(extension()):
            loss(model(inputs), labels).backward()
        for total, p in zip(totals, problem.parameters, strict=True):
            total += getattr(p, field)
    return torch.cat([total.flatten() for total in totals]) / terms


def diagonal(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Mean square of samples' gradients, with the labels of the data."""
    model, loss = extend(problem.model), extend(nn.CrossEntropyLoss(reduction="sum"))
    found: list[Tensor] = []
    meter.begin()
    meter.time("diagonal", lambda: found.append(accumulated(problem, model, loss, SumGradSquared, "sum_grad_squared")))
    return {"product": found[0]}


def agreement(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Both diagonals."""
    model, loss = extend(problem.model), extend(nn.CrossEntropyLoss(reduction="sum"))
    meter.begin()
    return {
        "empirical Fisher diagonal": accumulated(problem, model, loss, SumGradSquared, "sum_grad_squared"),
        "Gauss-Newton diagonal": accumulated(problem, model, loss, DiagGGNExact, "diag_ggn_exact"),
    }


if __name__ == "__main__":
    run(version("backpack-for-pytorch"), {"diagonal": diagonal, "agreement": agreement})
