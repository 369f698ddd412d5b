"""`hesse rotate`: rotate a model to remove outliers without changing its function."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hesse.checkpoints.locate import locate
from hesse.data.selection import Calibration, Data, Selection, select_samples
from hesse.errors import OptionError, VerificationError
from hesse.formats import open_checkpoint, open_networks
from hesse.jobs.forecast import Work, forecast, hidden_bytes, tokens_at_once, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import comparison_phases, evaluated_tokens, parameters
from hesse.jobs.options import check_model, run_options
from hesse.networks.network import CheckpointNetwork
from hesse.passes.stream import calibration_batch
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
    calibration = Calibration(data, samples, length, seed, batch_size)
    run = run_options(device, None, overwrite, restart, dry_run, progress)
    source = locate(model)
    with Job("rotate", str(model), [source], Path(out), calibration, run) as job:
        job.check_alone()
        _, network, _ = open_networks(source, run.device)
        rewriting = Rewriting(kind, network)
        selected = select_samples(source, calibration, network)
        checkpoint = rewriting.checkpoint
        job.notes += selected.notes
        if len(checkpoint.names()) > len(network.checkpoint.names()):
            job.notes.append("the head was the embeddings; it takes in the last norm's scales, so it has a tensor now")
        needed = 3 * checkpoint.stored_bytes + (1 << 20)
        needed += hidden_bytes(network, tokens_of(selected.samples)) if rewriting.learns else 0
        if dry_run:
            return Result(_forecast(job, rewriting, selected, needed))
        job.begin([network.checkpoint], {"kind": kind}, needed)
        _find(job, rewriting, selected.samples.batches(batch_size or calibration_batch(selected.samples.longest)))
        steps = job.steps("rotate", network, [])
        for index in range(len(steps.done), len(network.blocks)):
            steps.note(index, {}, checkpoint.read_stored(network.stored_in(network.blocks[index])))
        job.write_rest(checkpoint.names(), checkpoint.read_stored)
        job.notes += job.assemble(checkpoint.config)
        result = CheckpointNetwork(open_checkpoint(job.folder), torch.float32, run.device)
        evaluation = job.compare(result, network, selected.check)
        if not evaluation.difference <= MOST_DIVERGENCE:
            raise VerificationError(
                f"the rotated model differs from {model} by {evaluation.difference:.4g} nats per token: its weights "
                "lose too much in their type; nothing was put in place"
            )
        loss = evaluation.loss_change("rotated", selected.held_out)
        sizes = network.checkpoint.file_bytes, result.checkpoint.file_bytes
        report = RotationReport(kind=kind, tokens=evaluation.tokens, **job.head(*sizes, loss))
        job.finish(report)
    return Result(report)


def _forecast(job: Job, rewriting: Rewriting, selected: Selection, needed: int) -> ForecastReport:
    """Return what the run would take."""
    network, samples, size = rewriting.network, selected.samples, rewriting.network.checkpoint.file_bytes
    batch = tokens_at_once(job, samples) if rewriting.learns else 0
    phases = comparison_phases(network, samples.longest, max(evaluated_tokens(network, samples.longest), batch))
    for block in network.blocks:
        phases[f"run {block.name} in float32"] += rewriting.working_bytes
        phases[f"write {block.name}"] = 2 * 4 * parameters(block) + rewriting.working_bytes
    learned = tokens_of(samples) if rewriting.learns else 0
    work = Work(
        after=rewriting.checkpoint.stored_bytes,
        disk=needed,
        phases=phases,
        forward=2 * tokens_of(selected.check) + learned,
        bytes=(4 + rewriting.learns) * size,
        notes=["the time to find and apply rotations is not part of the estimate"],
    )
    return forecast(job, network, samples, work)


def _find(job: Job, rewriting: Rewriting, batches: list[torch.Tensor]) -> None:
    """Find the rotations, or recall those that an interrupted run found."""
    path = job.journal.folder / "rewriting.safetensors"
    job.progress.begin("rotate", len(rewriting.network.blocks))
    if job.journal.recall("rewriting") is None:
        samples = RewritingSamples(batches, {}, job.calibration.seed, job.journal.folder, job.progress.advance)
        rewriting.find(samples)
        rewriting.save(path)
        job.journal.record("rewriting", {}, [path])
    rewriting.load(path)
