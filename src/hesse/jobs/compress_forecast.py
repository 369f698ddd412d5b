"""Forecast of `hesse compress`."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hesse.estimation.calibrated import LayerStatistics
from hesse.jobs.block_solver import BlockResult, BlockSolver
from hesse.jobs.forecast import Work, forecast, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import fit_memory, waiting_bytes
from hesse.jobs.setup import Setup
from hesse.layerwise.rules import statistics_needed
from hesse.methods import Recipe
from hesse.networks.network import CheckpointNetwork, Layer
from hesse.planning.budget import Budget, BudgetRequest
from hesse.progress import Clock
from hesse.result import ForecastReport


def forecast_compression(job: Job, setup: Setup, request: Recipe | BudgetRequest, result_bytes: int) -> ForecastReport:
    """Return the forecast of a run; `setup` is that of the method alone if a budget is still to be planned.

    `result_bytes` is the room on the disk that the result takes at most.
    """
    checkpoint, solver, notes = setup.checkpoint, BlockSolver(setup, Clock()), list[str]()
    fits = fit_memory(setup, job.run.memory)
    layers = {x.name: x.weight.shape for x in setup.network.layers if setup.rules[x.name] is not None}
    size = checkpoint.stored_bytes
    for name, shape in layers.items():
        before = setup.network.tensors.dtype(f"{name}.weight").itemsize
        size += int(shape.numel() * (setup.format.stored_bits(name) / 8 - before))

    def solve(layer: Layer, statistics: LayerStatistics) -> object:
        known = LayerStatistics({**statistics, **_unit_statistics(setup, layer)})
        return solver.solve_layer(layer, known, BlockResult())

    by_sample = {"fisher blocks", "fisher gradients"}
    timed = not any(by_sample & set(names) for names in statistics_needed(setup.rules).values())
    if not timed:
        notes.append("the time to solve layers by gradients of samples is not part of the estimate")
    if isinstance(request, BudgetRequest):
        size = _planned_bytes(setup.network, request.budget, layers)
        notes.append("the time to plan, which solves every layer for each choice, is not part of the estimate")
    job.notes = list(setup.notes)
    probed = 0 if setup.statistics is not None else tokens_of(setup.probes)
    work = Work(
        after=size,
        disk=result_bytes + waiting_bytes(setup),
        phases={fits.largest: 0},
        forward=2 * tokens_of(setup.check) + probed,
        calibrated=0 if setup.statistics is not None else tokens_of(setup.samples),
        backward=probed,
        bytes=6 * checkpoint.file_bytes,
        layers=layers,
        solve=solve if timed else None,
        notes=notes,
    )
    report = forecast(job, setup.network, setup.samples, work)
    return replace(report, memory_bytes=fits.bound, method=setup.recipe.method)


def _planned_bytes(network: CheckpointNetwork, budget: Budget, layers: Mapping[str, torch.Size]) -> int:
    """Return the most bytes that a budget for `layers`, shapes by name, allows."""
    checkpoint = network.checkpoint
    if budget.size is not None:
        return budget.bytes_of(checkpoint.file_bytes)
    if budget.bits is None:
        return checkpoint.file_bytes
    dense = sum(shape.numel() * network.tensors.dtype(f"{name}.weight").itemsize for name, shape in layers.items())
    return checkpoint.stored_bytes - dense + int(sum(shape.numel() for shape in layers.values()) * budget.bits / 8)


def _unit_statistics(setup: Setup, layer: Layer) -> dict[str, Tensor]:
    """Return backward statistics of a layer as large as those that a run estimates, to take as long to solve with."""
    rows, columns = layer.weight.shape
    made = {
        "output factor": lambda: torch.eye(rows),
        "output diagonal": lambda: torch.ones(rows),
        "fisher diagonal": lambda: torch.ones(rows, columns),
    }
    return {name: made[name]() for name in statistics_needed(setup.rules).get(layer.name, ()) if name in made}
