"""`hesse compress`: compress a model from disk to disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import file_digest
from hesse.checkpoints.locate import locate
from hesse.checkpoints.output import check_room
from hesse.checkpoints.writer import SHARD_BYTES, writing
from hesse.curvature import Loss
from hesse.data.batches import token_ids
from hesse.data.selection import Calibration
from hesse.errors import OptionError
from hesse.estimation import Statistics
from hesse.estimation.calibrated import LayerStatistics
from hesse.estimation.statistics_folder import INDEX_FILE
from hesse.formats import open_checkpoint
from hesse.jobs.compression import BlockResult, BlockSolver, Compression
from hesse.jobs.forecast import Work, forecast, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import MemoryBound, fit_memory, waiting_bytes
from hesse.jobs.options import RunOptions, check_model, run_options
from hesse.jobs.report import CompressionReport
from hesse.jobs.setup import Setup, open_setup
from hesse.layerwise.rules import statistics_needed
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method, methods_of
from hesse.modules.compress import compress_in_memory
from hesse.networks.allocator import keep_no_large_memory
from hesse.networks.network import Layer
from hesse.passes.per_sample import FisherKind
from hesse.planning.budget import Budget, BudgetPlan, BudgetRequest, budget_request, plan_budget
from hesse.planning.singular_directions import directions_recipe
from hesse.progress import Clock, Progress
from hesse.result import ForecastReport, Result
from hesse.rewriting import Rewriting, RewritingSamples, RoundingTarget

# Why settings have no meaning for a module in memory.
FOR_FILES = {
    "out": "is a folder, and a module stays in memory",
    "statistics": "are of the files of a checkpoint",
    "size": "is a budget of the files of a checkpoint",
    "mean_bits": "is a budget that is planned on the files of a checkpoint",
    "loss": "is a budget that is planned on the files of a checkpoint (a loss is given as loss_function)",
    "target": "is a program that loads files",
    "allocation": "is how a budget of files is shared out",
    "memory": "bounds how much of a checkpoint is in memory, and a module is there as a whole",
    "overwrite": "is of a folder",
    "restart": "is of a run to a folder",
    "measure": "is of a checkpoint beside the dense one",
    "dry_run": "says what a run to a folder would take",
    "format": "is how files are written",
    "device": "is where a checkpoint is loaded, and a module is already somewhere",
}


def compress(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    method: str = DEFAULT_METHOD,
    recipe: Recipe | None = None,
    options: Options | None = None,
    ignore: Sequence[str] = (),
    data: Any = None,
    statistics: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    format: str = "auto",
    size: str | int | None = None,
    mean_bits: float | None = None,
    loss: float | None = None,
    target: str | None = None,
    allocation: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    memory: str | int | None = None,
    measure: bool = False,
    layers: Sequence[str] = ("*",),
    loss_function: Loss | nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    kind: FisherKind = "sampled",
    progress: Progress | None = None,
) -> Result[Any]:
    """Compress a language model or encoder on disk into a new folder that other programs load, or a module in memory.

    A killed run on disk resumes after the last block it finished, with the same result bit for bit. A module
    is copied and the copy is changed: see `hesse.modules.compress.compress_in_memory`, which takes `layers`,
    `loss_function`, `forward` and `kind`; options that concern files are refused for it.

    Args:
        model: a model folder, `default`, or a hub id, dense; or any `torch.nn.Module`.
        out: the folder to write; it must not exist unless `overwrite`. None for a module.
        method: a row of `hesse methods`, changed by `options`; or give a whole `recipe` instead.
        recipe: rules per layer, from `hesse.methods.load_recipe` or built in Python.
        options: options such as `Options(bits=3, group_size=64)`; None keeps the method's default.
        ignore: patterns of layers to leave unchanged.
        data: a text, JSON lines or parquet file, a datasets id, a `datasets.Dataset` with a column `input_ids`, or
            lists of token ids; None for the shipped text. For a module also batches: (inputs, targets) pairs or
            dictionaries.
        statistics: a folder of `estimate`, in place of calibration; `data` then only checks the result. Each layer is
            solved for the inputs that the dense model gives it.
        samples: calibration samples.
        length: tokens per sample; None for 2048 or the model's positions, whichever is less.
        seed: seed of the choice of samples and of sampled labels.
        batch_size: samples per batch; it changes memory and time, not the result.
        device: `auto`, `cpu`, or `cuda`.
        format: `auto`, `pack-quantized`, `int-quantized`, `dense` or `low-rank`.
        size: a budget for the weights' files, such as "40%" of the dense ones, "5MB", or a number of bytes. With this,
            `mean_bits` or `loss` the recipe is planned: see `plan`. For the method "acip" the size of the linear layers
            that are not ignored, of which its one ranking of singular directions takes any share.
        mean_bits: a budget of bits a weight over the planned layers, scales included.
        loss: a budget of predicted loss in nats per token.
        target: `transformers`, `vllm` or `any`: refuse, or do not plan, schemes that this loader does not support.
        allocation: the predictor of a budget's costs: `hawq` or `hawq-v2`; None solves every layer for every choice.
        overwrite: replace a model folder at `out`.
        restart: discard the work of an interrupted run to `out` instead of resuming it.
        dry_run: only estimate the bytes, memory and time of the run; write nothing.
        memory: the memory limit of the process, such as "8GiB" or a number of bytes; it determines which activations
            are kept on disk. None for most of the free memory.
        measure: also measure the cost of each layer alone, the range of the quadratic model, and the loss on text of
            the calibration, and generate continuations, for `hesse.reporting.compression_page`. It takes time.
        layers: patterns of the layers of a module to change.
        loss_function: the loss of a module; None for cross-entropy, or a language model's own.
        forward: `forward(model, inputs)` gives the outputs of a module.
        kind: "sampled" or "empirical" labels for the Fisher of a module.
        progress: receives each phase and step.

    Returns:
        A record of each layer, sizes in bytes, seconds by phase, and losses in nats per token.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do; nothing is left at `out`.
    """
    if isinstance(model, nn.Module):
        settings = {"out": out, "statistics": statistics, "size": size, "mean_bits": mean_bits, "loss": loss}
        settings |= {"target": target, "allocation": allocation, "memory": memory, "overwrite": overwrite or None}
        settings |= {
            "restart": restart or None,
            "measure": measure or None,
            "dry_run": dry_run or None,
            "format": {"auto": None}.get(format, format),
        }
        settings |= {"device": {"auto": None}.get(device, device)}
        for name, value in settings.items():
            if value is not None:
                raise OptionError(f"{name} {FOR_FILES[name]}: save the model and give the folder, or leave it out")
        return compress_in_memory(
            model,
            data,
            method=method,
            recipe=recipe,
            options=options,
            layers=layers,
            ignore=ignore,
            loss_function=loss_function,
            forward=forward,
            kind=kind,
            samples=samples,
            length=length,
            seed=seed,
            batch_size=batch_size,
        )
    check_model(model)
    if out is None:
        raise OptionError("a model on disk needs a folder to write: give out")
    if recipe is None and method in methods_of("compress_to_size"):
        if (
            size is None
            or statistics is None
            or any(given is not None for given in (mean_bits, loss, allocation, options))
        ):
            raise OptionError(
                f"the method {method} takes a size of the linear layers and statistics, no other budget and no "
                "options: give --size 60% and --statistics DIR, which `hesse estimate --curvature gram,kronecker` wrote"
            )
        run = run_options(device, memory, overwrite, restart, dry_run, progress)
        ranks = directions_recipe(locate(model), Path(statistics), size, tuple(ignore), run.device, run.progress)
        calibration = Calibration(data, samples, length, seed, batch_size)
        return compress_folder(model, Path(out), ranks, calibration, run, Path(statistics), format, target, measure)
    if tuple(layers) != ("*",) or loss_function is not None or forward is not None or kind != "sampled":
        raise OptionError("layers, loss_function, forward and kind are for modules: give a recipe for other layers")
    if data is not None and not isinstance(data, str | Path) and (ids := token_ids(data)) is not None:
        data = ids  # of a datasets.Dataset too
    budget = Budget(size, mean_bits, loss) if any(x is not None for x in (size, mean_bits, loss)) else None
    if budget is not None and recipe is not None:
        raise OptionError("a recipe leaves nothing to plan: leave out the recipe, or the budget")
    if budget is None and allocation is not None:
        raise OptionError("an allocation is how a budget is shared out: give a size, mean bits or a loss")
    if recipe is not None and (options is not None or ignore):
        raise OptionError("a recipe says everything itself: leave out options and ignore")
    request: Recipe | BudgetRequest
    if budget is not None:
        request = budget_request(budget, method, options, ignore, target, allocation)
    else:
        request = (
            find_method(method, "compress").recipe(options or Options(), tuple(ignore)) if recipe is None else recipe
        )
    calibration = Calibration(data, samples, length, seed, batch_size)
    run = run_options(device, memory, overwrite, restart, dry_run, progress)
    folder = None if statistics is None else Path(statistics)
    return compress_folder(model, Path(out), request, calibration, run, folder, format, target, measure)


def compress_folder(
    model: str | Path,
    out: Path,
    request: Recipe | BudgetRequest,
    calibration: Calibration,
    run: RunOptions,
    statistics: Path | None,
    format: str,
    target: str | None,
    measure: bool,
) -> Result[CompressionReport | ForecastReport]:
    """Compress a model by a recipe, or by the recipe that is planned for a budget; see `compress`."""
    source = locate(model)
    with Job("compress", str(model), [source], out, calibration, run) as job:
        estimated = None if statistics is None else Statistics(statistics)

        def open_setup_of(recipe: Recipe) -> Setup:
            with job.clock.phase("read"):
                return open_setup(source, recipe, calibration, estimated, format, run.device, target)

        setup = open_setup_of(request) if isinstance(request, Recipe) else None
        if run.dry_run:
            if isinstance(request, BudgetRequest):
                setup = open_setup_of(request.method.recipe(request.options, request.ignore))
            assert setup is not None
            return Result(_forecast(job, setup, request))
        checkpoint = open_checkpoint(source) if setup is None else setup.checkpoint
        needed = _most_bytes(checkpoint, setup)
        text = request.to_yaml() if isinstance(request, Recipe) else repr(request)
        index = None if estimated is None else file_digest(estimated.folder / INDEX_FILE)
        job.begin([checkpoint], {"recipe": text}, needed, {"format": format, "target": target, "statistics": index})
        budget = None
        if setup is None:
            assert isinstance(request, BudgetRequest)
            fits = None  # how planning keeps within a limit: as the method alone does
            if run.memory is not None:
                fits = fit_memory(open_setup_of(request.method.recipe(request.options, request.ignore)), run.memory)
            with job.clock.phase("plan"):
                budget = _plan_once(job, source, request, statistics, format, fits)
            setup = open_setup_of(budget.recipe)
        if not job.work.resumed:
            check_room(job.work.folder, out, needed + waiting_bytes(setup))
        fits = _fit_memory(job, setup)
        if run.memory is not None:
            keep_no_large_memory()
            job.progress.say(f"Memory: {fits.sentence()}.")
        if setup.rewriting is not None:
            with job.clock.phase("rewrite"):
                _rewrite(job, setup, setup.rewriting, fits.batch_size)
        report = Compression(job, setup, budget, fits).run(measure)
        job.finish(report)
    return Result(report)


def _forecast(job: Job, setup: Setup, request: Recipe | BudgetRequest) -> ForecastReport:
    """Return the forecast of a run; `setup` is that of the method alone if a budget is still to be planned."""
    checkpoint, solver, notes = setup.checkpoint, BlockSolver(setup, Clock()), list[str]()
    fits = fit_memory(setup, job.run.memory)
    layers = {x.name: x.weight.shape for x in setup.network.layers if setup.rules[x.name] is not None}
    size = checkpoint.stored_bytes
    for name, shape in layers.items():
        size += int(shape.numel() * (setup.format.stored_bits(name) / 8 - checkpoint.dtype(f"{name}.weight").itemsize))

    def solve(layer: Layer, statistics: LayerStatistics) -> object:
        known = LayerStatistics({**statistics, **_unit_statistics(setup, layer)})
        return solver.solve_layer(layer, known, BlockResult())

    by_sample = {"fisher blocks", "fisher gradients"}
    timed = not any(by_sample & set(names) for names in statistics_needed(setup.rules).values())
    if not timed:
        notes.append("the time to solve layers by gradients of samples is not part of the estimate")
    if isinstance(request, BudgetRequest):
        size = _planned_bytes(checkpoint, request.budget, layers)
        notes.append("the time to plan, which solves every layer for each choice, is not part of the estimate")
    job.notes = list(setup.notes)
    probed = 0 if setup.statistics is not None else tokens_of(setup.probes)
    work = Work(
        after=size,
        disk=_most_bytes(checkpoint, setup) + waiting_bytes(setup),
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


def _planned_bytes(checkpoint: Checkpoint, budget: Budget, layers: Mapping[str, torch.Size]) -> int:
    """Return the most bytes that a budget for `layers`, shapes by name, allows."""
    if budget.size is not None:
        return budget.bytes_of(checkpoint.file_bytes)
    if budget.bits is None:
        return checkpoint.file_bytes
    dense = sum(shape.numel() * checkpoint.dtype(f"{name}.weight").itemsize for name, shape in layers.items())
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


def _most_bytes(checkpoint: Checkpoint, setup: Setup | None) -> int:
    """Return bytes on disk that the result never exceeds, assembled from its parts."""
    size = checkpoint.file_bytes if setup is None else max(checkpoint.file_bytes, checkpoint.stored_bytes)
    return int(size * 1.05) + (1 << 20) + min(size, SHARD_BYTES)


def _plan_once(
    job: Job, model: Path, request: BudgetRequest, statistics: Path | None, format: str, fits: MemoryBound | None
) -> BudgetPlan:
    """Return the plan for a budget, which rank 0 makes and notes.

    Planning calibrates and solves each layer as a run of the method does, so that `fits` keeps both within a limit.
    """
    work, device, progress, calibration = job.work, job.run.device, job.progress, job.calibration
    if job.processes.is_main and work.journal.recall("plan") is None:
        offload = work.own.folder if fits is not None and fits.offloads else None
        if fits is not None:
            calibration = replace(calibration, batch_size=fits.batch_size)
        plan = plan_budget(
            model, request, calibration, statistics, format=format, device=device, progress=progress, offload=offload
        )
        work.journal.record("plan", plan.to_dict())
    job.processes.barrier()
    return BudgetPlan.from_dict(work.journal.expect("plan"))


def _rewrite(job: Job, setup: Setup, rewriting: Rewriting, batch_size: int) -> None:
    """Apply the rewriting to the model as it is read; rank 0 finds the rewriting and records it."""
    journal, progress = job.work.journal, job.progress
    path = journal.folder / "rewriting.safetensors"
    if job.processes.is_main and journal.recall("rewriting") is None:
        progress.begin("rewrite", len(setup.network.blocks))
        targets = {
            name: RoundingTarget(layer.constraint, layer.input_bits) for name, layer in setup.format.layers.items()
        }
        batches, seed = setup.samples.batches(batch_size), setup.calibration.seed
        rewriting.find(RewritingSamples(batches, targets, seed, journal.folder, progress.advance))
        with writing(path):
            rewriting.save(path)
        journal.record("rewriting", {}, [path])
    job.processes.barrier()
    rewriting.load(path)


def _fit_memory(job: Job, setup: Setup) -> MemoryBound:
    """Return the memory plan of the run, at the batch size it began with: the last digits depend on it."""
    noted = job.journal.recall("memory")
    fits = fit_memory(setup, job.run.memory, None if noted is None else noted["batch_size"])
    least = job.processes.all_reduce_min(fits.batch_size)
    if least < fits.batch_size:
        fits = fit_memory(setup, job.run.memory, least)
    job.journal.record("memory", {"batch_size": fits.batch_size})
    return fits
