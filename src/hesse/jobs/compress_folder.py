"""Compression of a model folder: planned if only a budget is given, fitted into memory, rewritten, and run."""

from dataclasses import dataclass, replace
from typing import Any

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import file_digest
from hesse.checkpoints.output import check_room
from hesse.checkpoints.writer import SHARD_BYTES, writing
from hesse.estimation import Statistics
from hesse.estimation.statistics_folder import INDEX_FILE
from hesse.formats import open_checkpoint
from hesse.jobs.compress_forecast import forecast_compression
from hesse.jobs.compression import Compression
from hesse.jobs.job import Job
from hesse.jobs.memory import MemoryBound, fit_memory, waiting_bytes
from hesse.jobs.report import CompressionReport
from hesse.jobs.setup import Setup, open_setup
from hesse.methods import Recipe
from hesse.networks.allocator import keep_no_large_memory
from hesse.planning.budget import BudgetRequest
from hesse.planning.plan import plan_budget
from hesse.result import ForecastReport
from hesse.rewriting import Rewriting, RewritingSamples, RoundingTarget


@dataclass(frozen=True, eq=False)
class CompressionRequest:
    """A compression of a model on disk."""

    aim: Recipe | BudgetRequest  # the recipe, or the budget to plan it for
    statistics: Statistics | None  # in place of calibration
    format: str
    target: str | None

    @property
    def recipe(self) -> Recipe:
        """Return the recipe; for a budget, that of the method alone."""
        return self.aim if isinstance(self.aim, Recipe) else self.aim.method.recipe(self.aim.options, self.aim.ignore)

    def open_setup(self, job: Job, recipe: Recipe) -> Setup:
        """Open the model of `job`, and make and check the plan of compressing it by `recipe`."""
        model, device = job.sources[0], job.run.device
        with job.clock.phase("read"):
            return open_setup(model, recipe, job.calibration, self.statistics, self.format, device, self.target)


def compress_folder(job: Job, request: CompressionRequest, measured: bool) -> CompressionReport | ForecastReport:
    """Compress the model of `job` by a recipe, or by the recipe that is planned for a budget; see `compress`."""
    aim, run, statistics, plan = request.aim, job.run, request.statistics, None
    planned = isinstance(aim, BudgetRequest)
    setup = None if planned and not run.dry_run else request.open_setup(job, request.recipe)
    checkpoint = open_checkpoint(job.sources[0]) if setup is None else setup.checkpoint
    needed = _most_bytes(checkpoint)
    if setup is not None and run.dry_run:
        return forecast_compression(job, setup, aim, needed)
    text = aim.to_yaml() if isinstance(aim, Recipe) else repr(aim)
    index = None if statistics is None else file_digest(statistics.folder / INDEX_FILE)
    settings = {"format": request.format, "target": request.target, "statistics": index}
    job.begin([checkpoint], {"recipe": text}, needed, settings)
    if setup is None:
        plan = _plan_once(job, request)
        setup = request.open_setup(job, Recipe.model_validate(plan["recipe"]))
    if not job.work.resumed:
        check_room(job.work.folder, job.out, needed + waiting_bytes(setup))
    fits = _fit_memory(job, setup)
    if run.memory is not None:
        keep_no_large_memory()
        job.progress.say(f"Memory: {fits.sentence()}.")
    if setup.rewriting is not None:
        with job.clock.phase("rewrite"):
            _rewrite(job, setup, setup.rewriting, fits.batch_size)
    report = Compression(job, setup, plan, fits).run(measured)
    job.finish(report)
    return report


def _most_bytes(checkpoint: Checkpoint) -> int:
    """Return bytes on disk that the result never exceeds, assembled from its parts."""
    size = max(checkpoint.file_bytes, checkpoint.stored_bytes)
    return int(size * 1.05) + (1 << 20) + min(size, SHARD_BYTES)


def _plan_once(job: Job, request: CompressionRequest) -> dict[str, Any]:
    """Return the plan for a budget, which rank 0 makes and records: its recipe, front and notes.

    Planning calibrates and solves each layer as a run of the method does, and keeps within a memory limit in that way.
    """
    aim, run, work, calibration, offload = request.aim, job.run, job.work, job.calibration, None
    assert isinstance(aim, BudgetRequest)
    if run.memory is not None:
        fits = fit_memory(request.open_setup(job, request.recipe), run.memory)
        calibration, offload = (
            replace(calibration, batch_size=fits.batch_size),
            work.own.folder if fits.offloads else None,
        )
    with job.clock.phase("plan"):
        if job.processes.is_main and work.journal.recall("plan") is None:
            plan = plan_budget(
                job.sources[0],
                aim,
                calibration,
                request.statistics,
                format=request.format,
                device=run.device,
                progress=job.progress,
                offload=offload,
            ).to_dict()
            work.journal.record("plan", {name: plan[name] for name in ("recipe", "front", "notes")})
        job.processes.barrier()
        return work.journal.expect("plan")


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
