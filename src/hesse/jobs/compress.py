"""The main job, a model from disk to disk: what a run settles and notes, once, before its first block."""

from pathlib import Path

import torch

from hesse.checkpoints.output import check_output, check_room, restore_replaced
from hesse.checkpoints.unfinished import Unfinished, unfinished
from hesse.checkpoints.writer import SHARD_BYTES, writing
from hesse.data.selection import Calibration
from hesse.estimation import Statistics
from hesse.formats import open_checkpoint
from hesse.jobs.build_report import versions
from hesse.jobs.identity import identity
from hesse.jobs.memory import MemoryPlan, plan_memory, waiting_bytes
from hesse.jobs.plan import Plan, make_plan
from hesse.jobs.report import CompressionReport
from hesse.jobs.run import Run
from hesse.methods.recipe import Recipe
from hesse.networks.allocator import keep_no_large_memory
from hesse.planning.budget import BudgetPlan, BudgetRequest, plan_budget
from hesse.processes import join_process_group
from hesse.progress import Clock, Progress, Silence
from hesse.rewriting import Rewriting, RewritingSamples, Target


def compress_checkpoint(
    model: Path,
    out: Path,
    wanted: Recipe | BudgetRequest,
    calibration: Calibration,
    statistics: Path | None = None,
    *,
    target: str | None = None,
    format: str,
    device: torch.device,
    overwrite: bool,
    restart: bool,
    memory: int | None,
    measured: bool,
    progress: Progress,
    name: str,
    version: str,
) -> CompressionReport:
    """Compress the model folder `model`, which a person calls `name`, into a new folder `out`.

    Where `measured`, the result is measured layer by layer, along the change and in words too, for a report.
    A `target` refuses what that loader does not serve. A budget in place of a recipe is planned first.
    With the folder `statistics` of `estimate_checkpoint`, curvature is read from there and no sample is calibrated on:
    each layer is then solved for the inputs that the dense model gives it.

    A run that was cut short is taken up where it was, unless `restart`, and comes to the same result bit for bit.
    At most `memory` bytes are taken, where they are given.

    Raises:
        HesseError: something is wrong with the model, the data, the options or the output; nothing is left at `out`.
    """
    clock, processes = Clock(), join_process_group(device)
    progress = progress if processes.is_main else Silence()
    if processes.is_main:
        restore_replaced(out)
        check_output(out, model, overwrite)
    estimated = None if statistics is None else Statistics(statistics)

    def settled(recipe: Recipe) -> Plan:
        with clock.phase("read"):
            return make_plan(model, recipe, calibration, estimated, format, device, target)

    plan = settled(wanted) if isinstance(wanted, Recipe) else None
    with clock.phase("read"):
        checkpoint = open_checkpoint(model) if plan is None else plan.checkpoint
        settings = {"format": format, "target": target, "device": device.type, "processes": processes.world_size}
        whole = dict[str, str]()
        if processes.is_main:  # which alone looks at it; all of the model is read for it
            whole = identity(checkpoint, wanted, calibration, estimated, settings, versions(version))
    size = checkpoint.file_bytes if plan is None else max(checkpoint.file_bytes, checkpoint.stored_bytes)
    expected_bytes = int(size * 1.05) + (1 << 20) + min(size, SHARD_BYTES)  # never less than the output will take
    with unfinished(out, processes) as work:
        work.begin(whole, expected_bytes, restart)
        planned = None
        if plan is None:
            assert isinstance(wanted, BudgetRequest)
            with clock.phase("plan"):
                planned = _planned(work, model, wanted, calibration, statistics, format, device, progress)
            plan = settled(planned.recipe)
        if not work.resumed:
            check_room(work.folder, out, expected_bytes + waiting_bytes(plan))
        fits = _memory(work, plan, memory)
        if memory is not None:
            keep_no_large_memory()
            progress.say(f"Memory: {fits.sentence()}.")
        if plan.rewriting is not None:
            with clock.phase("rewrite"):
                _rewrite(plan, plan.rewriting, fits.batch_size, work, progress)
        report = Run(plan, planned, fits, work, clock, progress, measured).run(name, version)
        work.finish()
    return report


def _planned(
    work: Unfinished,
    model: Path,
    request: BudgetRequest,
    calibration: Calibration,
    statistics: Path | None,
    format: str,
    device: torch.device,
    progress: Progress,
) -> BudgetPlan:
    """The plan for a budget, which one process makes, once."""
    if work.processes.is_main and work.journal.recall("plan") is None:
        planned = plan_budget(model, request, calibration, statistics, format=format, device=device, progress=progress)
        work.journal.record("plan", planned.to_dict())
    work.processes.barrier()
    return BudgetPlan.from_dict(work.journal.expect("plan"))


def _rewrite(plan: Plan, rewriting: Rewriting, batch_size: int, work: Unfinished, progress: Progress) -> None:
    """Have the model read as it is rewritten, in a way that one process finds, once."""
    path = work.journal.folder / "rewriting.safetensors"
    if work.processes.is_main and work.journal.recall("rewriting") is None:
        progress.begin("rewrite", len(plan.network.blocks))
        targets = {name: Target(layer.constraint, layer.input_bits) for name, layer in plan.format.layers.items()}
        batches, seed = plan.samples.batches(batch_size), plan.calibration.seed
        rewriting.find(RewritingSamples(batches, targets, seed, work.journal.folder, progress.advance))
        with writing(path):
            rewriting.save(path)
        work.journal.record("rewriting", {}, [path])
    work.processes.barrier()
    rewriting.load(path)


def _memory(work: Unfinished, plan: Plan, limit: int | None) -> MemoryPlan:
    """How the run keeps within its memory; samples go together as when it began, since the last digits show that."""
    noted = work.own.recall("memory")
    fits = plan_memory(plan, limit, None if noted is None else noted["batch_size"])
    least = work.processes.all_reduce_min(fits.batch_size)
    if least < fits.batch_size:
        fits = plan_memory(plan, limit, least)
    work.own.record("memory", {"batch_size": fits.batch_size})
    return fits
