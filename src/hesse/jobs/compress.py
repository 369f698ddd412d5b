"""`hesse compress`: compress a model from disk to disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import file_digest
from hesse.checkpoints.locate import locate
from hesse.checkpoints.output import check_room
from hesse.checkpoints.writer import SHARD_BYTES, writing
from hesse.data.selection import Calibration, Data
from hesse.errors import OptionError
from hesse.estimation import Statistics
from hesse.estimation.calibrated import LayerStatistics
from hesse.estimation.statistics_folder import INDEX_FILE
from hesse.formats import open_checkpoint
from hesse.jobs.block_solver import BlockResult, BlockSolver
from hesse.jobs.compression import Compression
from hesse.jobs.forecast import Work, seconds_of, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import MemoryPlan, plan_memory, waiting_bytes
from hesse.jobs.options import RunOptions, run_options
from hesse.jobs.plan import Plan, make_plan
from hesse.jobs.report import CompressionReport
from hesse.layerwise.rules import statistics_needed
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method
from hesse.networks.allocator import keep_no_large_memory
from hesse.networks.network import Layer
from hesse.planning.budget import Budget, BudgetPlan, BudgetRequest, budget_request, plan_budget
from hesse.progress import Clock, Progress
from hesse.result import ForecastReport, Result
from hesse.rewriting import Rewriting, RewritingSamples, RoundingTarget


def compress(
    model: str | Path,
    out: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    recipe: Recipe | None = None,
    options: Options | None = None,
    ignore: Sequence[str] = (),
    data: Data = None,
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
    progress: Progress | None = None,
) -> Result[CompressionReport | ForecastReport]:
    """Compress a language model or encoder on disk into a new folder that other programs load.

    A run that was killed resumes behind the last block it finished, to the same result bit for bit.

    Args:
        model: a model folder, `default`, or a hub id; dense.
        out: the folder to write; it must not exist unless `overwrite`.
        method: a row of `hesse methods`, changed by `options`; or give a whole `recipe` instead.
        recipe: what to do per layer, from `hesse.methods.load_recipe` or built in Python.
        options: `Options(bits=3, group_size=64)` and the like; what is None is the method's own choice.
        ignore: patterns of layer names to leave as they are.
        data: a text, JSON lines or parquet file, a datasets id, or lists of token ids; None for the shipped text.
        statistics: a folder of `estimate`, in place of calibration; `data` then only checks the result. Each layer is
            solved for the inputs that the dense model gives it.
        samples: calibration samples.
        length: tokens a sample; None for 2048, or as many as the model has positions for.
        seed: seed of the choice of samples and of sampled labels.
        batch_size: samples that go through the model together; it changes memory and time, not the result.
        device: `auto`, `cpu`, or `cuda`.
        format: `auto`, `pack-quantized`, `int-quantized`, `dense` or `low-rank`.
        size: a budget for the weights' files, such as "40%" of the dense ones, "5MB", or a number of bytes. With this,
            `mean_bits` or `loss` the recipe is planned: see `plan`.
        mean_bits: a budget of bits a weight over the planned layers, scales included.
        loss: a budget of predicted loss in nats per token.
        target: `transformers`, `vllm` or `any`: refuse, or do not plan, what that loader does not serve.
        allocation: how a budget's choices are priced: `hawq` or `hawq-v2`; None solves every layer for every choice.
        overwrite: replace a model folder at `out`.
        restart: discard what an interrupted run to `out` has done, rather than resume it.
        dry_run: only say what the run would take: bytes, memory and time. Nothing is written.
        memory: the most that the process may take, such as "8GiB" or a number of bytes: what is kept in memory and what
            on disk follows from it. None for most of what is free.
        measure: also measure what each layer costs alone, how far the quadratic model holds, and the loss on text that
            calibration saw, and write continuations: what `hesse.reporting.compression_page` shows. It takes time.
        progress: told how far the run is.

    Returns:
        What was done to each layer, sizes in bytes, seconds by phase, and losses in nats per token.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing has the name `out` then.
    """
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

        def open_plan(recipe: Recipe) -> Plan:
            with job.clock.phase("read"):
                return make_plan(source, recipe, calibration, estimated, format, run.device, target)

        plan = open_plan(request) if isinstance(request, Recipe) else None
        if run.dry_run:
            if isinstance(request, BudgetRequest):
                plan = open_plan(request.method.recipe(request.options, request.ignore))
            assert plan is not None
            return Result(_forecast(job, plan, request))
        checkpoint = open_checkpoint(source) if plan is None else plan.checkpoint
        needed = _most_bytes(checkpoint, plan)
        text = request.to_yaml() if isinstance(request, Recipe) else repr(request)
        index = None if estimated is None else file_digest(estimated.folder / INDEX_FILE)
        job.begin([checkpoint], {"recipe": text}, needed, {"format": format, "target": target, "statistics": index})
        budget = None
        if plan is None:
            assert isinstance(request, BudgetRequest)
            with job.clock.phase("plan"):
                budget = _plan_once(job, source, request, statistics, format)
            plan = open_plan(budget.recipe)
        if not job.work.resumed:
            check_room(job.work.folder, out, needed + waiting_bytes(plan))
        fits = _fit_memory(job, plan)
        if run.memory is not None:
            keep_no_large_memory()
            job.progress.say(f"Memory: {fits.sentence()}.")
        if plan.rewriting is not None:
            with job.clock.phase("rewrite"):
                _rewrite(job, plan, plan.rewriting, fits.batch_size)
        report = Compression(job, plan, budget, fits).run(measure)
        job.finish(report)
    return Result(report)


def _forecast(job: Job, plan: Plan, request: Recipe | BudgetRequest) -> ForecastReport:
    """Return what a run would take; `plan` is that of the method alone where a budget is still to be planned."""
    network, checkpoint, calibration = plan.network, plan.checkpoint, job.calibration
    fits = plan_memory(plan, job.run.memory)
    needed = _most_bytes(checkpoint, plan) + waiting_bytes(plan)
    rules = {name: rule for name, rule in plan.rules.items() if rule is not None}
    shapes = {layer.name: layer.weight.shape for layer in network.layers if layer.name in rules}
    size = checkpoint.stored_bytes
    for name, shape in shapes.items():
        stored = checkpoint.dtype(f"{name}.weight").itemsize
        size += int(shape.numel() * (plan.format.stored_bits(name) / 8 - stored))
    solver = BlockSolver(plan, Clock())
    calibrated = 0 if plan.statistics is not None else tokens_of(plan.samples)
    probed = 0 if plan.statistics is not None else tokens_of(plan.probes)
    blocks = len(network.blocks)
    work = Work(
        forward=blocks * (2 * tokens_of(plan.check) + probed),
        calibrated=blocks * calibrated,
        backward=blocks * probed,
        bytes=6 * checkpoint.file_bytes,
        layers=shapes,
    )

    def solve(layer: Layer, statistics: LayerStatistics) -> object:
        return solver.solve_layer(
            layer, LayerStatistics({**statistics, **_unit_statistics(plan, layer)}), BlockResult()
        )

    by_sample = {"fisher blocks", "fisher gradients"}
    known = not any(by_sample & set(names) for names in statistics_needed(plan.rules).values())
    seconds, notes = seconds_of(work, network, plan.samples, calibration.batch_size, solve if known else None)
    if not known:
        notes.append("the time to solve layers by gradients of samples is not part of the estimate")
    if isinstance(request, BudgetRequest):
        budget = request.budget
        weights = sum(shape.numel() for shape in shapes.values())
        if budget.size is not None:
            size = budget.bytes_of(checkpoint.file_bytes)
        elif budget.bits is not None:
            dense = sum(x.numel() * checkpoint.dtype(f"{n}.weight").itemsize for n, x in shapes.items())
            size = checkpoint.stored_bytes - dense + int(weights * budget.bits / 8)
        else:
            size = checkpoint.file_bytes
        notes.append("the time to plan, which solves every layer for each choice, is not part of the estimate")
    job.notes = list(plan.notes)
    report = job.forecast((checkpoint.file_bytes, size, size), needed, {fits.largest: 0}, (seconds, notes))
    return replace(report, memory_bytes=fits.bound, method=plan.recipe.method)


def _unit_statistics(plan: Plan, layer: Layer) -> dict[str, Tensor]:
    """Return backward statistics of a layer as large as those that a run estimates, to take as long to solve with."""
    rows, columns = layer.weight.shape
    made = {
        "output factor": lambda: torch.eye(rows),
        "output diagonal": lambda: torch.ones(rows),
        "fisher diagonal": lambda: torch.ones(rows, columns),
    }
    return {name: made[name]() for name in statistics_needed(plan.rules).get(layer.name, ()) if name in made}


def _most_bytes(checkpoint: Checkpoint, plan: Plan | None) -> int:
    """Return bytes on disk that the result never exceeds, assembled from its parts."""
    size = checkpoint.file_bytes if plan is None else max(checkpoint.file_bytes, checkpoint.stored_bytes)
    return int(size * 1.05) + (1 << 20) + min(size, SHARD_BYTES)


def _plan_once(job: Job, model: Path, request: BudgetRequest, statistics: Path | None, format: str) -> BudgetPlan:
    """Return the plan for a budget, which rank 0 makes and notes."""
    work, device, progress = job.work, job.run.device, job.progress
    if job.processes.is_main and work.journal.recall("plan") is None:
        plan = plan_budget(model, request, job.calibration, statistics, format=format, device=device, progress=progress)
        work.journal.record("plan", plan.to_dict())
    job.processes.barrier()
    return BudgetPlan.from_dict(work.journal.expect("plan"))


def _rewrite(job: Job, plan: Plan, rewriting: Rewriting, batch_size: int) -> None:
    """Have the model read as it is rewritten; rank 0 finds the rewriting and notes it."""
    journal, progress = job.work.journal, job.progress
    path = journal.folder / "rewriting.safetensors"
    if job.processes.is_main and journal.recall("rewriting") is None:
        progress.begin("rewrite", len(plan.network.blocks))
        targets = {
            name: RoundingTarget(layer.constraint, layer.input_bits) for name, layer in plan.format.layers.items()
        }
        batches, seed = plan.samples.batches(batch_size), plan.calibration.seed
        rewriting.find(RewritingSamples(batches, targets, seed, journal.folder, progress.advance))
        with writing(path):
            rewriting.save(path)
        journal.record("rewriting", {}, [path])
    job.processes.barrier()
    rewriting.load(path)


def _fit_memory(job: Job, plan: Plan) -> MemoryPlan:
    """Return how the run keeps within its memory, at the batch size it began with: the last digits depend on it."""
    noted = job.journal.recall("memory")
    fits = plan_memory(plan, job.run.memory, None if noted is None else noted["batch_size"])
    least = job.processes.all_reduce_min(fits.batch_size)
    if least < fits.batch_size:
        fits = plan_memory(plan, job.run.memory, least)
    job.journal.record("memory", {"batch_size": fits.batch_size})
    return fits
