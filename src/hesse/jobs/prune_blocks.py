"""Whole blocks pruned on disk, or made of blocks that stay."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from hesse.checkpoints.locate import locate
from hesse.checkpoints.tensor_store import TensorStore
from hesse.data.selection import Calibration, Selection, select_samples
from hesse.errors import OptionError, VerificationError
from hesse.evaluation.evaluate import compare, pass_through
from hesse.formats import open_checkpoint, open_networks
from hesse.jobs.blocks_report import BlocksReport, RemovedBlock
from hesse.jobs.forecast import Work, forecast, hidden_bytes, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import calibration_phases, comparison_phases, gradient_phases
from hesse.jobs.options import RunOptions
from hesse.layerwise.weight_sharing import SharedWeights
from hesse.methods.strategies import STRATEGIES
from hesse.networks.block_config import fewer_blocks_config, fewer_blocks_names
from hesse.networks.network import CheckpointNetwork, each_loaded
from hesse.options import setting
from hesse.passes.stream import advance, evaluation_batch, start
from hesse.result import ForecastReport, Result
from hesse.scores import find_score
from hesse.scores.blocks import Removals

MOST_DIFFERENCE = 1e-6  # nats per token between the result and the dense model run without the blocks


@dataclass(frozen=True)
class BlockRanking:
    """Remove the blocks of the lowest score, until a share of the blocks or a measured loss is reached.

    With the score "loss" blocks are removed one at a time, always the one whose removal costs least by measurement
    (greedy: AxFormer, Nagarajan et al., 2020, arXiv:2010.03688); with another in the order of their scores on the whole
    model, each removal measured as well.
    """

    score: str
    keep: float | None = setting(None, "Share of the blocks that stays; or give loss.")
    loss: float | None = setting(None, "Most that the removals may cost together, measured, in nats per token.")
    rank: int | None = field(default=None, init=False)  # beside each layer of blocks that share weights

    @property
    def name(self) -> str:
        """The method's name in a report."""
        return self.score

    def check(self) -> None:
        """Check the options.

        Raises:
            OptionError: not exactly one limit is given, or a value has no meaning.
        """
        find_score(self.score, "blocks")
        if (self.keep is None) == (self.loss is None):
            raise OptionError(
                "give one limit: --keep, the share of blocks that stays, or --loss, what removals may cost"
            )
        if self.keep is not None and not 0 < self.keep < 1:
            raise OptionError(f"--keep is {self.keep}, but must be a share of the blocks between 0 and 1, such as 0.75")
        if self.loss is not None and not 0 < self.loss < float("inf"):
            raise OptionError(f"--loss is {self.loss}: give a number of nats per token above 0")

    def number(self, blocks: int) -> int:
        """Return how many of the blocks are removed at most."""
        return blocks - 1 if self.keep is None else blocks - round(self.keep * blocks)

    def check_network(self, network: CheckpointNetwork) -> None:
        """Raise a HesseError if blocks of `network` cannot be removed so."""
        blocks = len(network.blocks)
        if not 0 < self.number(blocks) < blocks:
            raise OptionError(
                f"--keep {self.keep} of {blocks} blocks leaves {blocks - self.number(blocks)}: at least one must stay, "
                "and one be removed"
            )
        if self.rank is None:
            fewer_blocks_config(network, range(blocks))
            fewer_blocks_names(network, range(blocks))


@dataclass(frozen=True)
class BlockSharing(BlockRanking):
    """Make the blocks of the lowest score of the most similar ones that stay, scaled, plus a low rank in each layer.

    The files hold the sums, in the same bytes as before; the report counts what must be stored. Source: FlexiGPT
    (Smith et al., 2025, arXiv:2501.14713).
    """

    score: str = setting("loss", "Score that chooses the blocks: loss, cosine or quadratic.")
    rank: int | None = setting(32, "Rank beside each layer.")

    @property
    def name(self) -> str:
        return "flexigpt"

    def check(self) -> None:
        super().check()
        if self.rank is None:
            raise OptionError("flexigpt needs a rank, such as --rank 32")


BlockStrategy = BlockRanking | BlockSharing


def prune_blocks(
    model: str | Path, out: Path, strategy: BlockStrategy, calibration: Calibration, run: RunOptions
) -> Result[BlocksReport | ForecastReport]:
    """Remove whole blocks from a model on disk, or make them of blocks that stay; see `hesse.prune`."""
    source = locate(model)
    with Job("prune", str(model), [source], out, calibration, run) as job:
        job.check_alone()
        _, network, _ = open_networks(source, run.device)
        strategy.check_network(network)
        sharing = None if strategy.rank is None else SharedWeights(network, strategy.rank)
        selected = select_samples(source, calibration, network)
        job.notes += selected.notes
        removal = _Removal(job, network, sharing, strategy, selected)
        needed = 3 * network.checkpoint.file_bytes
        needed += (2 * len(network.blocks) + 4) * hidden_bytes(network, tokens_of(selected.samples))
        if run.dry_run:
            return Result(removal.forecast(needed))
        job.begin([network.checkpoint], {"options": repr(strategy)}, needed)
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
        strategy: BlockStrategy,
        selected: Selection,
    ) -> None:
        self.job, self.network, self.sharing = job, network, sharing
        self.strategy, self.selected = strategy, selected
        samples = selected.samples
        size = job.calibration.batch_size or evaluation_batch(network, samples.longest)
        self.batches = samples.batches(size)
        self.removed: list[RemovedBlock] = []
        self.scores: list[float] = []

    @property
    def kept(self) -> list[int]:
        """The blocks that stay."""
        removed = {each.block for each in self.removed}
        return [number for number in range(len(self.network.blocks)) if number not in removed]

    @cached_property
    def removals(self) -> Removals:
        """The dense model's own pass, made when the first removal is to be measured."""
        with self.job.clock.phase("score"):
            job = self.job
            return Removals(self.network, self.batches, job.journal.folder, job.progress, job.calibration.seed)

    def forecast(self, needed: int) -> ForecastReport:
        """Return what the run would take: as many blocks removed as `loss` could allow, where that is the limit."""
        network, samples, blocks = self.network, self.selected.samples, len(self.network.blocks)
        tokens, batch, removed = tokens_of(samples), self.batches[0].numel(), self.strategy.number(blocks)
        phases = comparison_phases(network, samples.longest, batch)
        if self.strategy.score == "quadratic":
            phases |= gradient_phases(network, batch, lambda _: 0)
        if self.sharing is not None:
            workspace = {layer.name: self.sharing.workspace(layer) for layer in network.layers}
            phases |= calibration_phases("replace", network, tokens, batch, workspace)
        runs = [  # of blocks, in each round
            (blocks - k) * (blocks - k + 1) / 2 if self.strategy.score == "loss" else 2 * (blocks - k)
            for k in range(removed)
        ]
        size = network.checkpoint.file_bytes
        smallest = 0
        if self.sharing is None and self.strategy.loss is None:
            smallest = removed * min(map(self._stored_bytes, range(blocks)))
        work = Work(
            after=size - smallest,
            disk=needed,
            phases=phases,
            forward=(1 + sum(runs) / blocks) * tokens + 3 * tokens_of(self.selected.check),
            calibrated=0 if self.sharing is None else tokens,
            backward=tokens if self.strategy.score == "quadratic" else 0,
            bytes=(removed + 6) * size,
        )
        return forecast(self.job, network, samples, work)

    def _stored_bytes(self, number: int) -> int:
        """Return the bytes of a block's tensors in the files."""
        checkpoint = self.network.checkpoint
        names = self.network.stored_in(self.network.blocks[number])
        return sum(checkpoint.shape(name).numel() * checkpoint.dtype(name).itemsize for name in names)

    def run(self) -> BlocksReport:
        """Do everything except renaming the result to OUT."""
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        self._choose()
        if not self.removed:
            raise OptionError(
                f"no block can be removed: the cheapest costs {min(self.scores):.4g} nats per token, above --loss "
                f"{self.strategy.loss:g}"
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
        return BlocksReport(
            **job.head(checkpoint.file_bytes, result.checkpoint.file_bytes, loss),
            method=self.strategy.name,
            score=self.strategy.score,
            rank=self.strategy.rank,
            parameters_before=parameters,
            parameters_after=parameters - sum(self._saved(each.block) for each in self.removed),
            scores=self.scores,
            removed=self.removed,
            kept=self.kept,
        )

    def _choose(self) -> None:
        """Choose the blocks to remove, in order, until the limit is reached; each choice is noted."""
        most = self.strategy.number(len(self.network.blocks))
        order: list[int] = []
        if self.strategy.score != "loss":
            self.scores = self.job.once("scores", self._score)["scores"]
            order = sorted(range(len(self.scores)), key=self.scores.__getitem__)
        while len(self.removed) < most:
            candidates = [order[len(self.removed)]] if order else self.kept
            costs = self._costs(candidates)
            self.scores = self.scores or [costs[number] for number in sorted(costs)]
            number = min(costs, key=costs.__getitem__)
            if self.strategy.loss is not None and costs[number] > self.strategy.loss:
                return
            score = self.scores[number] if order else costs[number]
            self.removed.append(RemovedBlock(number, score, costs[number]))

    def _score(self) -> dict[str, list[float]]:
        score = find_score(self.strategy.score)
        return {"scores": score.costs(self.removals, self.removals.partition).tolist()}

    def _costs(self, candidates: Sequence[int]) -> dict[int, float]:
        """Return the measured loss without each candidate, besides the blocks that were removed before."""

        def measure() -> dict[str, list[list[float]]]:
            measured = self.removals.without(self.kept, candidates)
            return {"costs": [[number, found.value] for number, found in measured.items()]}

        content = self.job.once(f"removal-{len(self.removed)}", measure)
        return {int(number): cost for number, cost in content["costs"]}

    def _share(self, sharing: SharedWeights) -> None:
        """Make the removed blocks of blocks that stay; write and note one block after another."""
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        job.progress.begin("share weights", len(network.blocks))
        blocks = network.blocks
        donors = {each.block: sharing.donor(blocks[each.block], self.kept) for each in self.removed}
        batches = start(network, self.batches, TensorStore(job.journal.folder, "shared", lasting=True))
        steps = job.steps("block", network, batches)
        errors = [content["error"] for content in steps.done]
        for index, weights, error in sharing.shared_blocks(donors, batches, len(errors), job.clock):
            names = [name for name in network.stored_in(blocks[index]) if name not in job.names]
            steps.note(index, {"error": error}, {**checkpoint.read_stored(names), **weights})
            errors.append(error)
            job.progress.advance()
        self.removed = [
            replace(each, donor=donors[each.block], relative_error=errors[each.block]) for each in self.removed
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
        for number, block in each_loaded(network, self.kept):
            advance(skipping, block.module, number)
        same = compare(result, passed, network, skipping, self.job.progress)
        if not same.difference <= MOST_DIFFERENCE:
            raise VerificationError(
                f"the blocks of {type(network.model).__name__} do other things in other places "
                f"({same.difference:.4g} nats per token): nothing was put in place; they cannot be removed from "
                "this architecture"
            )


STRATEGIES.register("block_ranking", BlockRanking)
STRATEGIES.register("block_sharing", BlockSharing)
