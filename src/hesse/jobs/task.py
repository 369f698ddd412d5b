"""Task: the work of a command that one process runs, from opening its models to its report."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.locate import locate
from hesse.checkpoints.tensor_store import TensorStore
from hesse.data.selection import PROBE_TOKENS, Calibration, select_samples
from hesse.estimation.calibrated import KnownStatistics, Layers, StatisticReaders, calibrated_blocks
from hesse.estimation.probe import probe
from hesse.estimation.statistics import Needs
from hesse.evaluation.evaluate import Evaluation
from hesse.formats import open_checkpoint
from hesse.jobs.forecast import Work, forecast
from hesse.jobs.job import Job
from hesse.jobs.options import RunOptions
from hesse.jobs.recorded_blocks import BlockRecord, record_blocks
from hesse.networks.network import Block, CheckpointNetwork
from hesse.passes.stream import calibration_batch, start
from hesse.result import REPORT_FILE, ForecastReport, Report, Result

R = TypeVar("R", bound=Report)


class Task(ABC, Generic[R]):
    """Work of one command, opened and checked before anything is written; see `run_task`.

    A subclass opens the model that the samples pass through, `network`, and sets `needed_bytes`.

    Raises:
        HesseError: the data cannot be used.
    """

    needed_bytes: int  # free space on the disk that the run needs, OUT included

    def __init__(self, job: Job, network: CheckpointNetwork, probe_tokens: int = PROBE_TOKENS) -> None:
        self.job, self.network = job, network
        self.selected = select_samples(job.sources[0], job.calibration, network, probe_tokens)
        self.batch_size = job.calibration.batch_size or calibration_batch(self.selected.samples.longest)
        job.notes += self.selected.notes

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that the result depends on."""
        return [self.network.checkpoint]

    @abstractmethod
    def work(self) -> Work:
        """Return what the run would take."""

    @abstractmethod
    def run(self) -> R:
        """Do everything except renaming the result to OUT."""

    def probe(self, network: CheckpointNetwork, needs: Needs) -> dict[str, StatisticReaders]:
        """Collect the backward statistics that the layers of the unchanged `network` need."""
        job = self.job
        job.progress.begin("probe the loss", 2 * len(network.blocks) + 1)
        seed, folder, step = job.calibration.seed, job.journal.folder, job.progress.advance
        return probe(network, self.selected.probes, needs, folder, seed, job.clock, step, job.journal)

    def solve_blocks(
        self,
        phase: str,
        needs: Needs,
        solve: Callable[[Block, Layers, Sequence[dict[str, Any]]], BlockRecord],
        known: KnownStatistics = MappingProxyType({}),
    ) -> list[dict[str, Any]]:
        """Pass the samples through `network`; solve, write and record one block after another.

        `solve` gets each block, its layers as `calibrated_blocks` yields them, and the contents of the records of all
        blocks before. Returns the contents of all records in order.
        """
        job, network = self.job, self.network
        job.progress.begin(phase, len(network.blocks))
        with job.clock.phase("calibrate"):
            store = TensorStore(job.journal.folder, "calibration", lasting=True)
            flows = start(network, self.selected.samples.batches(self.batch_size), store)

        def finish(done: Sequence[dict[str, Any]]) -> Iterator[BlockRecord]:
            for block, layers in calibrated_blocks(
                network, flows, needs, known=known, first=len(done), clock=job.clock
            ):
                yield solve(block, layers, done)

        return record_blocks(job, network, flows, finish)

    def measure(self) -> Evaluation:
        """Evaluate the assembled result against `network`, the dense model, on the check samples."""
        result = CheckpointNetwork(open_checkpoint(self.job.folder), torch.float32, self.network.device)
        return self.job.compare(result, self.network, self.selected.check)

    def head(self, evaluation: Evaluation, changed: str) -> dict[str, Any]:
        """Return the fields that all reports share, of a result with `changed` as the model's name."""
        loss = evaluation.loss_change(changed, self.selected.held_out)
        return self.job.head(self.network.checkpoint.file_bytes, evaluation.bytes, loss)


def run_task(
    command: str,
    models: Sequence[str | Path],
    out: Path,
    calibration: Calibration,
    run: RunOptions,
    request: dict[str, str],
    open_task: Callable[[Job], Task[R]],
    mark: str = "config.json",
    report_file: str = REPORT_FILE,
) -> Result[R | ForecastReport]:
    """Run a command on the folders of `models`: forecast it, or do it and give its result the name `out`.

    `request`, `mark` and `report_file` are as in `Job.begin`, `Job` and `Job.finish`.
    """
    sources = [locate(model) for model in models]
    with Job(command, str(models[0]), sources, out, calibration, run, mark) as job:
        job.check_alone()
        with job.clock.phase("read"):
            task = open_task(job)
        if run.dry_run:
            return Result(forecast(job, task.network, task.selected.samples, task.work()))
        job.begin(task.checkpoints, request, task.needed_bytes)
        report = task.run()
        job.finish(report, report_file)
    return Result(report)
