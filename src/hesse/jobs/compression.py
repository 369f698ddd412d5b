"""Compression of a folder: the dense model's pass, solving blocks in order, reading back and measuring the result."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from hesse.checkpoints.tensor_store import TensorStore
from hesse.estimation.calibrated import KnownStatistics, Layers, calibrated_blocks, stored_blocks
from hesse.estimation.probe import check_pass, probe
from hesse.evaluation.measure import measure
from hesse.evaluation.measurements import Measurements
from hesse.formats import open_checkpoint
from hesse.jobs.block_solver import BlockResult, BlockSolver
from hesse.jobs.job import Job
from hesse.jobs.memory import MemoryBound
from hesse.jobs.report import CompressionReport
from hesse.jobs.setup import Setup
from hesse.jobs.verify import verify
from hesse.layerwise.rules import statistics_needed
from hesse.networks.network import Block, CheckpointNetwork
from hesse.passes.stream import StreamBatch, evaluation_batch, start
from hesse.progress import peak_memory
from hesse.result import LossChange

RECIPE_FILE = "recipe.yaml"


class Compression:
    """State of one run of `job`: its plan, and its finished work."""

    def __init__(self, job: Job, setup: Setup, plan: dict[str, Any] | None, memory: MemoryBound) -> None:
        self.job, self.setup, self.memory = job, setup, memory
        self.plan = {"front": None, "notes": []} if plan is None else plan
        self.result = BlockResult()
        self.known: KnownStatistics = {}  # the backward statistics

    def run(self, with_measurements: bool) -> CompressionReport:
        """Do everything except renaming the result to OUT."""
        setup, job = self.setup, self.job
        dense = self._dense_pass()
        self._solve_blocks()
        job.processes.barrier()  # for the parts that other ranks write
        if job.processes.is_main:
            with job.clock.phase("write"):
                files = {**setup.format.files(), RECIPE_FILE: setup.recipe.to_yaml()}
                job.assemble(setup.format.config(), files)
            self._verify(dense)
        job.processes.barrier()
        loss = LossChange(**job.work.journal.expect("verified"))
        measurements = None
        if with_measurements and job.processes.is_main:
            with job.clock.phase("measure"):
                measurements = self._measure()
        return self._report(loss, measurements)

    def _dense_pass(self) -> list[StreamBatch]:
        """Collect the backward statistics, and return the check samples after the unchanged model's last block."""
        setup, job = self.setup, self.job
        clock, journal, step, processes = job.clock, job.journal, job.progress.advance, job.processes
        passes = 1 if setup.statistics is not None else 3
        job.progress.begin("probe the loss", passes * len(setup.network.blocks) + (passes > 1))
        batch_size = evaluation_batch(setup.dense, setup.length)
        batches = setup.check.batches(batch_size) if processes.is_main else []
        flows = check_pass(setup.original, batches, clock, step, journal)
        if setup.statistics is None:
            needs, seed, folder = statistics_needed(setup.rules), setup.calibration.seed, journal.folder
            self.known = probe(setup.network, setup.probes, needs, folder, seed, clock, step, journal, processes)
        return flows

    def _solve_blocks(self) -> None:
        """Pass the calibration samples through the blocks; solve, write and record one block after another."""
        setup, job, blocks = self.setup, self.job, self.setup.network.blocks
        job.progress.begin("compress", len(blocks))
        flows = self._flows()
        solver = BlockSolver(setup, job.clock, job.processes)
        steps = job.steps("block", setup.network, flows)
        for content in steps.done:
            self.result.add(BlockResult.from_dict(content))
            job.progress.advance()
        for index, (block, layers) in enumerate(self._layers(flows, len(steps.done)), len(steps.done)):
            result, tensors = solver.solve(block, layers)
            steps.note(index, result.to_dict(), tensors)
            self.result.add(result)
            job.progress.advance()
        if job.processes.is_main:
            inside = {name for block in blocks for name in setup.network.stored_in(block)}
            outside = [name for name in setup.checkpoint.stored_names() if name not in inside]
            with job.clock.phase("write"):
                job.write_rest(outside, setup.checkpoint.read_stored)

    def _flows(self) -> list[StreamBatch]:
        """Return the calibration samples of this rank at the first block; none if statistics replace them."""
        setup, job = self.setup, self.job
        if setup.statistics is not None:
            return []
        with job.clock.phase("calibrate"):
            store = TensorStore(job.journal.folder, "calibration", lasting=True)
            size = min(self.memory.batch_size, max(len(setup.samples.ids) // job.processes.world_size, 1))
            _, batches = job.processes.shard(setup.samples.batches(size))
            return start(setup.network, batches, store)

    def _layers(self, flows: list[StreamBatch], first: int) -> Iterator[tuple[Block, Layers]]:
        """Yield the blocks from number `first` on, and their layers with statistics of the flows or of a folder."""
        setup, job, needs = self.setup, self.job, statistics_needed(self.setup.rules)
        if setup.statistics is not None:
            return stored_blocks(setup.network, setup.statistics, needs, first=first, clock=job.clock)
        offload = job.journal.folder if self.memory.offloads else None
        return calibrated_blocks(
            setup.network,
            flows,
            needs,
            known=self.known,
            first=first,
            clock=job.clock,
            processes=job.processes,
            offload=offload,
        )

    def _verify(self, dense: list[StreamBatch]) -> None:
        """Read the result back, compare it with the solution and the prediction, and record the difference."""
        setup, job = self.setup, self.job
        predicted = {
            layer.name: (layer.predicted_loss_increase or 0.0) + (layer.predicted_input_loss or 0.0)
            for layer in self.result.layers
        }
        with job.clock.phase("verify"):
            written = CheckpointNetwork(open_checkpoint(job.folder), torch.float32, job.run.device)
            job.check_loads(written, setup.original.checkpoint, dense[0].ids)
            loss = verify(
                written,
                setup.original,
                dense,
                self.result.digests,
                predicted,
                setup.held_out,
                job.progress,
            )
        job.work.journal.record("verified", asdict(loss))

    def _measure(self) -> Measurements:
        """Measure each layer alone, points along the change, and continuations."""
        setup, job = self.setup, self.job
        costs = {layer.name: layer.predicted_loss_increase for layer in self.result.layers}
        result, folder = open_checkpoint(job.folder), job.journal.folder
        return measure(setup.dense, result, setup.check, setup.seen, costs, folder, job.progress)

    def _report(self, loss: LossChange, measurements: Measurements | None) -> CompressionReport:
        setup, job, layers = self.setup, self.job, self.result.layers
        after, before = open_checkpoint(job.folder), setup.original.checkpoint
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        bits = sum(layer.shape[0] * layer.shape[1] * layer.bits_per_weight for layer in layers)
        by_key, digests = setup.network.tensors.by_key, self.result.digests
        copied = [
            key
            for key in setup.checkpoint.stored_names()
            if not any(name.removesuffix(".weight") in digests for name in by_key.get(key, [key]))
        ]
        job.notes = list(dict.fromkeys([*self.plan["notes"], *setup.notes, *self.result.notes, *job.notes]))
        return CompressionReport(
            **job.head(before.file_bytes, after.file_bytes, loss),
            method=setup.recipe.method,
            format=setup.format.name,
            peak_rss_bytes=peak_memory(),
            bits_per_weight=bits / weights,
            bits_per_weight_model=8 * after.stored_bytes / sum(p.numel() for p in setup.dense.model.parameters()),
            tensors_equal=len(copied) + len(self.result.digests),
            calibration={
                "source": setup.samples.source,
                "statistics": None if setup.statistics is None else str(setup.statistics.folder),
                "samples": len(setup.samples.ids),
                "length": setup.length,
                "tokens": sum(len(ids) for ids in setup.samples.ids),
                "seed": setup.calibration.seed,
                "fingerprint": setup.samples.fingerprint(),
            },
            layers=layers,
            recipe=setup.recipe.model_dump(mode="json", exclude_none=True),
            front=self.plan["front"],
            measurements=measurements,
        )
