"""`hesse rotate`: rotate a model to remove outliers without changing its function."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hesse.data.selection import Calibration, Data
from hesse.errors import OptionError, VerificationError
from hesse.formats import open_networks
from hesse.jobs.forecast import Work, hidden_bytes, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import comparison_phases, evaluated_tokens, parameters
from hesse.jobs.options import check_model, run_options
from hesse.jobs.recorded_blocks import BlockRecord, record_blocks
from hesse.jobs.task import Task, run_task
from hesse.progress import Progress
from hesse.result import ForecastReport, Report, Result
from hesse.rewriting import ROTATIONS, Rewriting, RewritingSamples

MOST_DIVERGENCE = 1e-2  # nats per token that rounding the rotated weights to their type may cost; 1e-5 is usual


@dataclass(frozen=True, kw_only=True)
class RotationReport(Report):
    """The rotated model; `loss` is what rounding its weights to their type costs, and should be near zero."""

    kind: str
    tokens: int  # that the loss was measured on


def rotate(
    model: str | Path,
    out: str | Path,
    *,
    kind: str = "hadamard",
    data: Data = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    bos: bool | None = None,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result[RotationReport | ForecastReport]:
    """Write a model of the same function whose inputs and weights have no outliers, to be rounded afterwards.

    Norms are folded into the layers behind them; the features of the residual stream are rotated, and each head's
    values. Llama, Mistral, Qwen2, Qwen3 and Gemma models can be rotated; the result is an ordinary model folder.

    Args:
        model: a model folder, `default`, or a hub id; dense.
        out: the folder to write; it must not exist unless `overwrite`.
        kind: `hadamard`, which looks at data only to check the result, or `kurtail`, learned on the samples.
        data: a text, JSON lines or parquet file, a datasets id, or lists of token ids; None for the shipped text.
        samples: samples to learn from.
        length: tokens per sample; None for 2048 or the model's positions, whichever is less.
        seed: seed of the random rotations and of the choice of samples.
        batch_size: samples per batch.
        bos: start windows of text with BOS, or not; None for what the tokenizer does.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: replace a model folder at `out`.
        restart: discard the work of an interrupted run to `out` instead of resuming it.
        dry_run: only estimate the bytes, memory and time of the run; write nothing.
        progress: receives each phase and step.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do; nothing is left at `out`.
    """
    check_model(model)
    if kind not in ROTATIONS:
        raise OptionError(f"there is no rotation {kind!r}; there are {', '.join(ROTATIONS)}")
    calibration = Calibration(data, samples, length, seed, batch_size, bos)
    run = run_options(device, None, overwrite, restart, dry_run, progress)
    return run_task("rotate", [model], Path(out), calibration, run, {"kind": kind}, lambda job: _Rotation(job, kind))


class _Rotation(Task[RotationReport]):
    """The rewriting found, the rotated blocks written one after another, and the result measured."""

    def __init__(self, job: Job, kind: str) -> None:
        _, network, _ = open_networks(job.sources[0], job.run.device)
        self.rewriting = Rewriting(kind, network)
        super().__init__(job, network)
        self.checkpoint = self.rewriting.checkpoint
        if len(self.checkpoint.names()) > len(network.checkpoint.names()):
            job.notes.append("the head was the embeddings; it takes in the last norm's scales, so it has a tensor now")
        self.needed_bytes = 3 * self.checkpoint.stored_bytes + (1 << 20)
        if self.rewriting.learns:
            self.needed_bytes += hidden_bytes(network, tokens_of(self.selected.samples))

    def work(self) -> Work:
        network, rewriting, samples = self.network, self.rewriting, self.selected.samples
        batch = self.batch_size * samples.longest if rewriting.learns else 0
        phases = comparison_phases(network, samples.longest, max(evaluated_tokens(network, samples.longest), batch))
        for block in network.blocks:
            phases[f"run {block.name} in float32"] += rewriting.working_bytes
            phases[f"write {block.name}"] = 2 * 4 * parameters(block) + rewriting.working_bytes
        learned = tokens_of(samples) if rewriting.learns else 0
        return Work(
            after=rewriting.checkpoint.stored_bytes,
            disk=self.needed_bytes,
            phases=phases,
            forward=2 * tokens_of(self.selected.check) + learned,
            bytes=(4 + rewriting.learns) * network.checkpoint.file_bytes,
            notes=["the time to find and apply rotations is not part of the estimate"],
        )

    def run(self) -> RotationReport:
        job, network, checkpoint = self.job, self.network, self.checkpoint
        self._find()

        def rotated(done: Sequence[object]) -> Iterator[BlockRecord]:
            for block in network.blocks[len(done) :]:
                yield BlockRecord({}, checkpoint.read_stored(network.stored_in(block)))

        job.progress.begin("rotate", len(network.blocks))
        record_blocks(job, network, [], rotated)
        job.write_rest(checkpoint.names(), checkpoint.read_stored)
        job.notes += job.assemble(checkpoint.config)
        evaluation = self.measure()
        if not evaluation.difference <= MOST_DIVERGENCE:
            raise VerificationError(
                f"the rotated model differs from {job.name} by {evaluation.difference:.4g} nats per token: its weights "
                "lose too much in their type; nothing was put in place"
            )
        head = self.head(evaluation, "rotated")
        return RotationReport(kind=self.rewriting.kind, tokens=evaluation.tokens, **head)

    def _find(self) -> None:
        """Find the rotations, or recall those that an interrupted run found."""
        job, journal, rewriting = self.job, self.job.journal, self.rewriting
        path = journal.folder / "rewriting.safetensors"
        job.progress.begin("find rotations", len(self.network.blocks))
        if journal.recall("rewriting") is None:
            batches = self.selected.samples.batches(self.batch_size)
            rewriting.find(RewritingSamples(batches, {}, job.calibration.seed, journal.folder, job.progress.advance))
            rewriting.save(path)
            journal.record("rewriting", {}, [path])
        rewriting.load(path)
