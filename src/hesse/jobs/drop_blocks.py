"""`hesse drop-blocks`: remove whole blocks from a model on disk, or make them of blocks that stay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.locate import locate
from hesse.data.selection import Calibration, Data, Selection, select_samples
from hesse.errors import OptionError, VerificationError
from hesse.evaluation.evaluate import compare, pass_through
from hesse.formats import open_checkpoint
from hesse.formats.opening import open_networks
from hesse.jobs.drop_report import DroppedBlock, DropReport
from hesse.jobs.job import Job
from hesse.jobs.options import run_options
from hesse.layerwise.weight_sharing import StandIns
from hesse.networks.block_config import fewer_blocks_config, fewer_blocks_names
from hesse.networks.network import CheckpointNetwork
from hesse.passes.batch_sizes import evaluation_batch
from hesse.passes.stream import advance, start
from hesse.progress import Progress
from hesse.result import Result
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
    progress: Progress | None = None,
) -> Result[DropReport]:
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
        progress: told how far the run is.

    Returns:
        Every block's score, what each removal cost by measurement, and what the whole change costs on other samples.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing has the name `out` then.
    """
    request = DropRequest(blocks, loss, importance, share_rank)
    calibration = Calibration(data, samples, length, seed, batch_size)
    run = run_options(device, None, overwrite, restart, progress=progress)
    source = locate(model)
    with Job("drop-blocks", str(model), [source], Path(out), calibration, run) as job:
        job.check_alone()
        _, network, _ = open_networks(source, run.device)
        request.check(network)
        sharing = None if share_rank is None else StandIns(network, share_rank)
        selected = select_samples(source, calibration, network)
        job.notes += selected.notes
        job.begin([network.checkpoint], {"options": repr(request)}, 3 * network.checkpoint.file_bytes)
        removal = _Removal(job, network, sharing, request, selected)
        report = removal.run()
        job.finish(report)
    return Result(report)


class _Removal:
    """One run: blocks chosen, replaced where weights are shared, written and measured."""

    def __init__(
        self, job: Job, network: CheckpointNetwork, sharing: StandIns | None, request: DropRequest, selected: Selection
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

    def run(self) -> DropReport:
        """Do everything but give the result its name."""
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        self._choose()
        if not self.dropped:
            raise OptionError(
                f"no block can go: the cheapest costs {min(self.scores):.4g} nats per token, above --loss "
                f"{self.request.loss:g}"
            )
        weights = {} if self.sharing is None else self._share(self.sharing)
        parameters = sum(p.numel() for p in network.model.parameters())
        self._write(weights)
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

    def _share(self, sharing: StandIns) -> dict[str, Tensor]:
        """Return the weights of the dropped blocks, made of blocks that stay, by the tensors' names."""
        blocks = self.network.blocks
        donors = {drop.block: sharing.donor(blocks[drop.block], self.kept) for drop in self.dropped}
        weights, errors = sharing.replace(donors, self.batches, self.job.journal.folder, self.job.progress)
        self.dropped = [
            replace(drop, donor=donors[drop.block], relative_error=errors[drop.block]) for drop in self.dropped
        ]
        return weights

    def _saved(self, number: int) -> int:
        """Return how many parameters need not be stored once a block is removed, or made of another."""
        block = self.network.blocks[number]
        if self.sharing is not None:
            return sum(layer.weight.numel() for layer in block.layers) - self.sharing.parameters(block)
        return sum(parameter.numel() for parameter in block.module.parameters())

    def _write(self, weights: dict[str, Tensor]) -> None:
        """Write the tensors that stay or were made, a block at a time, and assemble the result."""
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        numbers = list(range(len(network.blocks))) if self.sharing is not None else self.kept
        config = checkpoint.config if self.sharing is not None else fewer_blocks_config(network, numbers)
        names, done = fewer_blocks_names(network, numbers), set[str]()
        groups = [*(network.stored_in(network.blocks[number]) for number in numbers), *([name] for name in names)]
        for group in groups:
            rest = [name for name in group if name not in done]
            if rest:
                tensors = checkpoint.read_stored(rest)
                tensors |= {name: weights[name] for name in rest if name in weights}
                job.write({names[name]: tensor for name, tensor in tensors.items()})
                done |= set(rest)
        job.notes += job.assemble(config)

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
