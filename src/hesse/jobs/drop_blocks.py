"""`hesse drop-blocks`: remove whole blocks from a model on disk, or make them of blocks that stay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from hesse.checkpoints.locate import locate
from hesse.checkpoints.tensor_store import TensorStore
from hesse.data.selection import Calibration, Data, Selection, select_samples
from hesse.errors import OptionError, VerificationError
from hesse.evaluation.evaluate import compare, pass_through
from hesse.formats import open_checkpoint
from hesse.formats.opening import open_networks
from hesse.jobs.drop_report import DroppedBlock, DropReport
from hesse.jobs.forecast import Work, hidden_bytes, seconds_of, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import COMPARING, activations, collecting, comparing, running, stopping, taking_gradients
from hesse.jobs.options import run_options
from hesse.layerwise.weight_sharing import SharedWeights
from hesse.networks.block_config import fewer_blocks_config, fewer_blocks_names
from hesse.networks.network import CheckpointNetwork
from hesse.passes.batch_sizes import evaluation_batch
from hesse.passes.stream import advance, start
from hesse.progress import Progress
from hesse.result import ForecastReport, Result
from hesse.scores import find_score
from hesse.scores.blocks import Removals

IMPORTANCES = ("loss", "cosine", "quadratic")
MOST_DIFFERENCE = 1e-6  # nats per token between the result and the dense model run without the blocks


@dataclass(frozen=True)
class DropRequest:
    """How many blocks are removed, or what loss that may cost at most, and how they are chosen.

    Raises:
        OptionError: not exactly one limit is given, or a value has no meaning.
    """

    blocks: int | None = None
    loss: float | None = None  # nats per token, measured on the samples that blocks are judged by
    importance: str = "loss"
    share_rank: int | None = None

    def __post_init__(self) -> None:
        if (self.blocks is None) == (self.loss is None):
            raise OptionError("give one limit: --blocks to drop, or the --loss that they may cost at most")
        if self.importance not in IMPORTANCES:
            raise OptionError(f"there is no importance {self.importance!r}: use {', '.join(IMPORTANCES)}")
        if self.blocks is not None and self.blocks < 1:
            raise OptionError(f"--blocks is {self.blocks}, but must be at least 1")
        if self.loss is not None and not 0 < self.loss < float("inf"):
            raise OptionError(f"--loss is {self.loss}: give a number of nats per token above 0")

    def check(self, network: CheckpointNetwork) -> None:
        """Raise a HesseError if blocks of `network` cannot be removed so."""
        count = len(network.blocks)
        if self.blocks is not None and self.blocks >= count:
            raise OptionError(f"--blocks is {self.blocks}, but the model has {count}: one must stay")
        if self.share_rank is None:
            fewer_blocks_config(network, range(count))
            fewer_blocks_names(network, range(count))


def drop_blocks(
    model: str | Path,
    out: str | Path,
    *,
    blocks: int | None = None,
    loss: float | None = None,
    importance: str = "loss",
    share_rank: int | None = None,
    data: Data = None,
    samples: int = 16,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result[DropReport | ForecastReport]:
    """Remove whole blocks from a model on disk, or make them of blocks that stay; transformers loads the result.

    With the importance "loss" blocks are removed one at a time, always the one whose removal costs least by
    measurement; with another in the order of their scores on the whole model, each removal measured as well.

    Args:
        model: a model folder, `default`, or a hub id; dense.
        out: the folder to write; it must not exist unless `overwrite`.
        blocks: how many blocks to remove; or give `loss`.
        loss: remove as many as cost no more than this together, in nats per token, measured on the samples.
        importance: "loss", measured (greedy: AxFormer, Nagarajan et al., 2020, arXiv:2010.03688); "cosine", how little
            a block turns the hidden states (ShortGPT, Men et al., 2024, arXiv:2403.03853); or "quadratic", what the
            true Fisher predicts.
        share_rank: do not remove blocks, but make each of the most similar one that stays, its outputs scaled, and a
            low rank beside each layer (FlexiGPT, Smith et al., 2025, arXiv:2501.14713). The files hold the sums, in as
            many bytes as before; the report counts what has to be stored.
        data: a text, JSON lines or parquet file, a datasets id, or lists of token ids; None for the shipped text.
        samples: samples that blocks are judged by.
        length: tokens a sample; None for 2048, or as many as the model has positions for.
        seed: seed of the choice of samples and of sampled labels.
        batch_size: samples that go through the model together.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: replace a model folder at `out`.
        restart: discard what an interrupted run to `out` has done, rather than resume it.
        dry_run: only say what the run would take: bytes, memory and time. Nothing is written.
        progress: told how far the run is.

    Returns:
        Every block's score, what each removal cost by measurement, and what the whole change costs on other samples.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing has the name `out` then.
    """
    request = DropRequest(blocks, loss, importance, share_rank)
    calibration = Calibration(data, samples, length, seed, batch_size)
    run = run_options(device, None, overwrite, restart, dry_run, progress)
    source = locate(model)
    with Job("drop-blocks", str(model), [source], Path(out), calibration, run) as job:
        job.check_alone()
        _, network, _ = open_networks(source, run.device)
        request.check(network)
        sharing = None if share_rank is None else SharedWeights(network, share_rank)
        selected = select_samples(source, calibration, network)
        job.notes += selected.notes
        removal = _Removal(job, network, sharing, request, selected)
        needed = 3 * network.checkpoint.file_bytes
        needed += (2 * len(network.blocks) + 4) * hidden_bytes(network, tokens_of(selected.samples))
        if dry_run:
            return Result(removal.forecast(needed))
        job.begin([network.checkpoint], {"options": repr(request)}, needed)
        report = removal.run()
        job.finish(report)
    return Result(report)


class _Removal:
    """One run: blocks chosen, replaced where weights are shared, written and measured."""

    def __init__(
        self,
        job: Job,
        network: CheckpointNetwork,
        sharing: SharedWeights | None,
        request: DropRequest,
        selected: Selection,
    ) -> None:
        self.job, self.network, self.sharing = job, network, sharing
        self.request, self.selected = request, selected
        samples = selected.samples
        size = job.calibration.batch_size or evaluation_batch(network, samples.longest)
        self.batches = samples.batches(size)
        self.dropped: list[DroppedBlock] = []
        self.scores: list[float] = []

    @property
    def kept(self) -> list[int]:
        """The blocks that stay."""
        dropped = {drop.block for drop in self.dropped}
        return [number for number in range(len(self.network.blocks)) if number not in dropped]

    @cached_property
    def removals(self) -> Removals:
        """The dense model's own pass, made when the first removal is to be measured."""
        with self.job.clock.phase("score"):
            job = self.job
            return Removals(self.network, self.batches, job.journal.folder, job.progress, job.calibration.seed)

    def forecast(self, needed: int) -> ForecastReport:
        """Return what the run would take: as many blocks removed as `loss` could allow, where that is the limit."""
        network, job, samples = self.network, self.job, self.selected.samples
        tokens, length, blocks = tokens_of(samples), samples.longest, len(network.blocks)
        removed = self.request.blocks or blocks - 1
        batch = self.batches[0].numel()
        phases = {COMPARING: comparing(network, length)}
        for block in network.blocks:
            phases[f"run {block.name} in float32"] = running(network, block, batch)
            if self.request.importance == "quadratic":
                phases[f"take gradients through {block.name}"] = taking_gradients(network, block, batch, 0)
            if self.sharing is not None:
                solving = max(self.sharing.workspace(layer) + collecting(layer, batch) for layer in block.layers)
                waiting = activations(network, block, tokens, network.dtype.itemsize)
                phases[f"replace {block.name}"] = stopping(network, block, waiting) + solving
        passes = (
            1.0
            + sum(  # blocks that run in each round
                (blocks - k) * (blocks - k + 1) / 2 if self.request.importance == "loss" else 2 * (blocks - k)
                for k in range(removed)
            )
            / blocks
        )
        size, loss = network.checkpoint.file_bytes, self.request.loss
        work = Work(
            forward=int(blocks * (passes * tokens + 3 * tokens_of(self.selected.check))),
            calibrated=0 if self.sharing is None else blocks * tokens,
            backward=blocks * tokens if self.request.importance == "quadratic" else 0,
            bytes=(removed + 6) * size,
        )
        estimate = seconds_of(work, network, samples, job.calibration.batch_size)
        after = size
        if self.sharing is None and loss is None:
            smallest = min(sum(self._stored_bytes(number) for number in [k] * removed) for k in range(blocks))
            after -= smallest
        return job.forecast((size, after, after), needed, phases, estimate)

    def _stored_bytes(self, number: int) -> int:
        """Return the bytes of a block's tensors in the files."""
        checkpoint = self.network.checkpoint
        names = self.network.stored_in(self.network.blocks[number])
        return sum(checkpoint.shape(name).numel() * checkpoint.dtype(name).itemsize for name in names)

    def run(self) -> DropReport:
        """Do everything but give the result its name."""
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        self._choose()
        if not self.dropped:
            raise OptionError(
                f"no block can go: the cheapest costs {min(self.scores):.4g} nats per token, above --loss "
                f"{self.request.loss:g}"
            )
        if self.sharing is not None:
            self._share(self.sharing)
        parameters = sum(p.numel() for p in network.model.parameters())
        self._write()
        result = CheckpointNetwork(open_checkpoint(job.folder), torch.float32, network.device)
        if self.sharing is None:
            self._check(result)
        evaluation = job.compare(result, network, self.selected.check)
        loss = evaluation.loss_change("changed", self.selected.held_out)
        return DropReport(
            **job.head(checkpoint.file_bytes, result.checkpoint.file_bytes, loss),
            method=self.request.importance,
            parameters_before=parameters,
            parameters_after=parameters - sum(self._saved(drop.block) for drop in self.dropped),
            share_rank=self.request.share_rank,
            scores=self.scores,
            dropped=self.dropped,
            kept=self.kept,
        )

    def _choose(self) -> None:
        """Choose the blocks to remove, in order, until the limit is reached; each choice is noted."""
        most = self.request.blocks or len(self.network.blocks) - 1
        order: list[int] = []
        if self.request.importance != "loss":
            self.scores = self.job.once("scores", self._score)["scores"]
            order = sorted(range(len(self.scores)), key=self.scores.__getitem__)
        while len(self.dropped) < most:
            candidates = [order[len(self.dropped)]] if order else self.kept
            costs = self._costs(candidates)
            self.scores = self.scores or [costs[number] for number in sorted(costs)]
            number = min(costs, key=costs.__getitem__)
            if self.request.loss is not None and costs[number] > self.request.loss:
                return
            score = self.scores[number] if order else costs[number]
            self.dropped.append(DroppedBlock(number, score, costs[number]))

    def _score(self) -> dict[str, list[float]]:
        score = find_score(self.request.importance)
        return {"scores": score.costs(self.removals, self.removals.partition).tolist()}

    def _costs(self, candidates: Sequence[int]) -> dict[int, float]:
        """Return the measured loss without each candidate, besides the blocks that were dropped before."""

        def measure() -> dict[str, list[list[float]]]:
            measured = self.removals.without(self.kept, candidates)
            return {"costs": [[number, found.value] for number, found in measured.items()]}

        content = self.job.once(f"removal-{len(self.dropped)}", measure)
        return {int(number): cost for number, cost in content["costs"]}

    def _share(self, sharing: SharedWeights) -> None:
        """Make the dropped blocks of blocks that stay; write and note one block after another."""
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        job.progress.begin("share weights", len(network.blocks))
        blocks = network.blocks
        donors = {drop.block: sharing.donor(blocks[drop.block], self.kept) for drop in self.dropped}
        batches = start(network, self.batches, TensorStore(job.journal.folder, "shared", lasting=True))
        steps = job.steps("block", network, batches)
        errors = [content["error"] for content in steps.done]
        for index, weights, error in sharing.shared_blocks(donors, batches, len(errors), job.clock):
            names = [name for name in network.stored_in(blocks[index]) if name not in job.names]
            steps.note(index, {"error": error}, {**checkpoint.read_stored(names), **weights})
            errors.append(error)
            job.progress.advance()
        self.dropped = [
            replace(drop, donor=donors[drop.block], relative_error=errors[drop.block]) for drop in self.dropped
        ]

    def _saved(self, number: int) -> int:
        """Return how many parameters need not be stored once a block is removed, or made of another."""
        block = self.network.blocks[number]
        if self.sharing is not None:
            return sum(layer.weight.numel() for layer in block.layers) - self.sharing.parameters(block)
        return sum(parameter.numel() for parameter in block.module.parameters())

    def _write(self) -> None:
        """Write the tensors that stay, a block at a time, and assemble the result."""
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        if self.sharing is not None:
            job.write_rest(checkpoint.stored_names(), checkpoint.read_stored)
            job.notes += job.assemble(checkpoint.config)
            return
        names, done = fewer_blocks_names(network, self.kept), set[str]()
        groups = [*(network.stored_in(network.blocks[number]) for number in self.kept), *([name] for name in names)]
        for group in groups:
            rest = [name for name in group if name not in done]
            if rest:
                job.write({names[name]: tensor for name, tensor in checkpoint.read_stored(rest).items()})
                done |= set(rest)
        job.notes += job.assemble(fewer_blocks_config(network, self.kept))

    def _check(self, result: CheckpointNetwork) -> None:
        """Check that the result is the dense model without the blocks.

        Raises:
            VerificationError: its blocks do not do what they did in their places before.
        """
        network, check = self.network, self.selected.check
        batches = check.batches(evaluation_batch(network, check.longest))
        passed, skipping = pass_through(result, batches, self.job.progress, "verify"), start(network, batches)
        for number in self.kept:
            with network.loaded(network.blocks[number]) as module:
                advance(skipping, module, number)
        same = compare(result, passed, network, skipping, self.job.progress)
        if not same.difference <= MOST_DIFFERENCE:
            raise VerificationError(
                f"the blocks of {type(network.model).__name__} do other things in other places "
                f"({same.difference:.4g} nats per token): nothing was put in place; they cannot be dropped from this "
                "architecture"
            )
