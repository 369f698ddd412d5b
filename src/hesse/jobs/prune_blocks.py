"""Whole blocks pruned on disk, or made of blocks that stay."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from hesse.data.selection import Calibration
from hesse.errors import OptionError, VerificationError
from hesse.estimation.calibrated import Layers
from hesse.evaluation.evaluate import compare, pass_through
from hesse.formats import open_checkpoint, open_networks
from hesse.jobs.block_strategies import BlockRanking
from hesse.jobs.blocks_report import BlocksReport, RemovedBlock
from hesse.jobs.forecast import Work, hidden_bytes, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import calibration_phases, comparison_phases, gradient_phases
from hesse.jobs.options import RunOptions
from hesse.jobs.recorded_blocks import BlockRecord
from hesse.jobs.task import Task, run_task
from hesse.layerwise.layer_solver import LayerSolver
from hesse.layerwise.weight_sharing import SharedWeights
from hesse.networks.block_config import fewer_blocks_config, fewer_blocks_names
from hesse.networks.network import Block, CheckpointNetwork, each_loaded
from hesse.passes.stream import advance, evaluation_batch, start
from hesse.result import ForecastReport, Result
from hesse.scores import find_score
from hesse.scores.blocks import Removals

MOST_DIFFERENCE = 1e-6  # nats per token between the result and the dense model run without the blocks


def prune_blocks(
    model: str | Path, out: Path, strategy: BlockRanking, calibration: Calibration, run: RunOptions
) -> Result[BlocksReport | ForecastReport]:
    """Remove whole blocks from a model on disk, or make them of blocks that stay; see `hesse.prune`."""
    options = {"options": repr(strategy)}
    return run_task("prune", [model], out, calibration, run, options, lambda job: _Removal(job, strategy))


class _Removal(Task[BlocksReport]):
    """Blocks chosen, replaced where weights are shared, written and measured."""

    def __init__(self, job: Job, strategy: BlockRanking) -> None:
        _, network, _ = open_networks(job.sources[0], job.run.device)
        strategy.check_network(network)
        self.strategy = strategy
        self.sharing = None if strategy.rank is None else SharedWeights(network, strategy.rank)
        super().__init__(job, network)
        samples = self.selected.samples
        self.batch_size = job.calibration.batch_size or evaluation_batch(network, samples.longest)
        self.needed_bytes = 3 * network.checkpoint.file_bytes
        self.needed_bytes += (2 * len(network.blocks) + 4) * hidden_bytes(network, tokens_of(samples))
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
            job, batches = self.job, self.selected.samples.batches(self.batch_size)
            return Removals(self.network, batches, job.journal.folder, job.progress, job.calibration.seed)

    def work(self) -> Work:
        """Return what the run would take: as many blocks removed as `loss` could allow, where that is the limit."""
        network, samples, blocks = self.network, self.selected.samples, len(self.network.blocks)
        tokens, removed, score = tokens_of(samples), self.strategy.number(blocks), self.strategy.score
        batch = samples.batches(self.batch_size)[0].numel()
        phases = comparison_phases(network, samples.longest, batch)
        if score == "quadratic":
            phases |= gradient_phases(network, batch, lambda _: 0)
        if self.sharing is not None:
            workspace = {layer.name: self.sharing.workspace(layer) for layer in network.layers}
            phases |= calibration_phases("replace", network, tokens, batch, workspace)
        left = range(blocks, blocks - removed, -1)  # blocks in each round
        runs = sum(k * (k + 1) / 2 if score == "loss" else 2 * k for k in left)
        size, smallest = network.checkpoint.file_bytes, 0
        if self.sharing is None and self.strategy.loss is None:
            smallest = removed * min(map(self._stored_bytes, range(blocks)))
        return Work(
            after=size - smallest,
            disk=self.needed_bytes,
            phases=phases,
            forward=(1 + runs / blocks) * tokens + 3 * tokens_of(self.selected.check),
            calibrated=0 if self.sharing is None else tokens,
            backward=tokens if score == "quadratic" else 0,
            bytes=(removed + 6) * size,
        )

    def _stored_bytes(self, number: int) -> int:
        """Return the bytes of a block's tensors in the files."""
        checkpoint = self.network.checkpoint
        names = self.network.stored_in(self.network.blocks[number])
        return sum(checkpoint.shape(name).numel() * checkpoint.dtype(name).itemsize for name in names)

    def run(self) -> BlocksReport:
        self._choose()
        if not self.removed:
            raise OptionError(
                f"no block can be removed: the cheapest costs {min(self.scores):.4g} nats per token, above --loss "
                f"{self.strategy.loss:g}"
            )
        if self.sharing is not None:
            self._share(self.sharing)
        parameters = sum(p.numel() for p in self.network.model.parameters())
        self._write()
        if self.sharing is None:
            self._check()
        return BlocksReport(
            **self.head(self.measure(), "changed"),
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
        network, blocks, solver = self.network, self.network.blocks, LayerSolver()
        donors = {each.block: sharing.donor(blocks[each.block], self.kept) for each in self.removed}

        def share(block: Block, layers: Layers, done: Sequence[object]) -> BlockRecord:
            donor = blocks[donors[len(done)]] if len(done) in donors else None
            weights, error = sharing.share_block(block, layers, donor, solver)
            written = self.job.names
            names = [name for name in network.stored_in(block) if name not in written]
            return BlockRecord({"error": error}, {**network.checkpoint.read_stored(names), **weights})

        needs = {layer.name: ("inputs",) for index in donors for layer in blocks[index].layers}
        records = self.solve_blocks("share weights", needs, share)
        self.removed = [
            replace(each, donor=donors[each.block], relative_error=records[each.block]["error"])
            for each in self.removed
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

    def _check(self) -> None:
        """Check that the result is the dense model without the blocks.

        Raises:
            VerificationError: its blocks do not do what they did in their places before.
        """
        network, check = self.network, self.selected.check
        result = CheckpointNetwork(open_checkpoint(self.job.folder), torch.float32, network.device)
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
