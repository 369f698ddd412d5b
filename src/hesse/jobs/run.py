"""One run: the blocks solved in turn, each written and noted as it is done, read back at the end and accounted for."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hesse.checkpoints.output import copy_companions
from hesse.checkpoints.tensor_store import TensorStore
from hesse.checkpoints.unfinished import Unfinished
from hesse.checkpoints.writer import Part, assemble, write_part, write_text
from hesse.estimation.calibrated import Known, Layers, calibrated_blocks, stored_blocks
from hesse.estimation.probe import check_pass, probe
from hesse.evaluation.measure import measure
from hesse.formats import open_checkpoint
from hesse.jobs.block_solver import BlockResult, BlockSolver
from hesse.jobs.build_report import account
from hesse.jobs.memory import MemoryPlan
from hesse.jobs.plan import Plan
from hesse.jobs.report import CompressionReport, Verification
from hesse.jobs.verify import verify
from hesse.layerwise.rules import statistics_needed
from hesse.networks.network import Block
from hesse.passes.batch_sizes import evaluation_batch
from hesse.passes.stream import StreamBatch, start, take_up
from hesse.planning.budget import BudgetPlan
from hesse.progress import Clock, Progress, peak_memory

REPORT_FILE = "compression.json"
RECIPE_FILE = "recipe.yaml"


class Run:
    """The state of one run: its plan, and what is done of it."""

    def __init__(
        self,
        plan: Plan,
        planned: BudgetPlan | None,
        memory: MemoryPlan,
        work: Unfinished,
        clock: Clock,
        progress: Progress,
        measured: bool,
    ) -> None:
        self.plan, self.planned, self.memory, self.work = plan, planned, memory, work
        self.clock, self.progress, self.measured = clock, progress, measured
        self.result = BlockResult()
        self.known: Known = {}  # backward statistics
        self.parts: list[Part] = []
        self.earlier: dict[str, float] = {}  # seconds by phase of processes that were cut short

    def run(self, name: str, version: str) -> CompressionReport:
        """Do it all, or what is left of it; everything is written into the unfinished folder."""
        plan, folder = self.plan, self.work.checkpoint
        dense = self._dense_pass()
        self._compress()
        self.work.processes.barrier()  # for the parts that others write
        if self.work.processes.is_main:
            with self.clock.phase("write"):
                assemble(self.parts, folder)
                self._write_companions(folder)
            self._verify(dense)
        self.work.processes.barrier()
        verification = Verification(**self.work.journal.expect("verified"))
        report = account(
            plan,
            self.planned,
            self.result,
            verification,
            self._seconds(),
            folder=folder,
            out=self.work.out,
            name=name,
            version=version,
        )
        if self.measured and self.work.processes.is_main:
            with self.clock.phase("measure"):
                costs = {layer.name: layer.predicted_loss_increase for layer in self.result.layers}
                result = open_checkpoint(folder)
                waiting = self.work.journal.folder
                measurements = measure(plan.dense, result, plan.check, plan.seen, costs, waiting, self.progress)
            seconds, peak = self._seconds(), peak_memory()
            report = replace(report, measurements=measurements, seconds=seconds, peak_rss_bytes=peak)
        if self.work.processes.is_main:
            write_text(folder / RECIPE_FILE, plan.recipe.to_yaml())
            write_text(folder / REPORT_FILE, json.dumps(report.to_dict(), indent=2) + "\n")
        return report

    def _verify(self, dense: list[StreamBatch]) -> None:
        """Read the checkpoint back, and note what was found."""
        plan, folder = self.plan, self.work.checkpoint
        with self.clock.phase("verify"):
            predicted = {
                layer.name: (layer.predicted_loss_increase or 0.0) + (layer.predicted_input_loss or 0.0)
                for layer in self.result.layers
            }
            verification = verify(
                folder,
                plan.checkpoint,
                plan.original,
                dense,
                self.result.digests,
                predicted,
                plan.held_out,
                self.progress,
            )
        self.work.journal.record("verified", asdict(verification))

    def _dense_pass(self) -> list[StreamBatch]:
        """Collect the backward statistics, and return the check samples after all blocks of the unchanged model."""
        plan, journal, step, processes = self.plan, self.work.own, self.progress.advance, self.work.processes
        walks = 1 if plan.statistics is not None else 3
        self.progress.begin("probe the loss", walks * len(plan.network.blocks) + (walks > 1))
        batch_size = evaluation_batch(plan.dense, plan.length)
        batches = plan.check.batches(batch_size) if processes.is_main else []
        flows = check_pass(plan.original, batches, self.clock, step, journal)
        if plan.statistics is None:
            needs, seed, folder = statistics_needed(plan.rules), plan.calibration.seed, journal.folder
            self.known = probe(plan.network, plan.probes, needs, folder, seed, self.clock, step, journal, processes)
        return flows

    def _compress(self) -> None:
        """Take the calibration samples through the blocks, and write each once it is solved."""
        plan, journal, blocks = self.plan, self.work.own, self.plan.network.blocks
        self.progress.begin("compress", len(blocks))
        flows: list[StreamBatch] = []
        if plan.statistics is None:
            with self.clock.phase("calibrate"):
                shelf = TensorStore(journal.folder, "calibration", lasting=True)
                processes = self.work.processes
                size = min(self.memory.batch_size, max(len(plan.samples.ids) // processes.world_size, 1))
                _, batches = processes.shard(plan.samples.batches(size))
                flows = start(plan.network, batches, shelf)
        solver = BlockSolver(plan, self.clock, self.work.processes)
        done = self._taken_up(flows)
        for _ in range(done):
            self.progress.advance()
        for index, (block, layers) in enumerate(self._layers(flows, done), done):
            writes = self.work.processes.writer(index) == self.work.processes.rank
            result, part = solver.solve(block, layers, self._part(index), writes)
            self._note(index, result, part, flows)
            self.progress.advance()
        if not self.work.processes.is_main:
            return
        with self.clock.phase("write"):
            inside = {name for block in blocks for name in plan.network.stored_in(block)}
            for name in plan.checkpoint.stored_names():
                if name not in inside:
                    path = journal.folder / f"part-{len(self.parts)}.safetensors"
                    self.parts.append(write_part(path, plan.checkpoint.read_stored([name])))

    def _layers(self, flows: list[StreamBatch], done: int) -> Iterator[tuple[Block, Layers]]:
        """The blocks from number `done` on, and their layers with statistics: of the flows, or estimated before."""
        plan, needs = self.plan, statistics_needed(self.plan.rules)
        if plan.statistics is not None:
            return stored_blocks(plan.network, plan.statistics, needs, first=done, clock=self.clock)
        offload = self.work.own.folder if self.memory.paused_on_disk else None
        return calibrated_blocks(
            plan.network,
            flows,
            needs,
            known=self.known,
            first=done,
            clock=self.clock,
            processes=self.work.processes,
            offload=offload,
        )

    def _note(self, index: int, result: BlockResult, part: Part, flows: list[StreamBatch]) -> None:
        """Note that a block is solved, with what the flows are after it."""
        journal = self.work.own
        with self.clock.phase("write"):
            if flows:
                journal.record_tensors(f"calibration-{index + 1}", [flow.waiting for flow in flows], {})
            content = {"result": result.to_dict(), "part": [part.names, part.bytes], "seconds": self._phases()}
            own = self.work.processes.writer(index) == self.work.processes.rank
            journal.record(f"block-{index}", content, [part.path] if own else [])
            journal.forget(f"calibration-{index - 1}")
        self._add(result, part)

    def _taken_up(self, flows: list[StreamBatch]) -> int:
        """How many blocks an earlier process has solved; the flows go on behind them."""
        journal, notes, processes = self.work.own, list[dict[str, Any]](), self.work.processes
        while (note := journal.recall(f"block-{len(notes)}")) is not None:
            notes.append(note)
        done = processes.all_reduce_min(len(notes))
        while done and self.plan.statistics is None:  # what flows into the next block is needed too
            recalled = journal.recall_tensors(f"calibration-{done}", self.plan.network.device)
            if processes.all_reduce_min(recalled is not None) and recalled is not None:
                take_up(flows, recalled[0], done)
                break
            done -= 1
        for index, note in enumerate(notes[:done]):
            self._add(BlockResult.from_dict(note["result"]), Part(self._part(index), *note["part"]))
            self.earlier = note["seconds"]
        return done

    def _part(self, number: int) -> Path:
        """The file of a block's tensors, in the folder of the process that writes it."""
        return self.work.journals(self.work.processes.writer(number)) / f"part-{number}.safetensors"

    def _add(self, result: BlockResult, part: Part) -> None:
        self.result.layers += result.layers
        self.result.notes += result.notes
        self.result.digests |= result.digests
        self.parts.append(part)

    def _phases(self) -> dict[str, float]:
        """Seconds by phase, those of earlier processes too."""
        now = self.clock.seconds
        return {phase: self.earlier.get(phase, 0.0) + now.get(phase, 0.0) for phase in {**now, **self.earlier}}

    def _seconds(self) -> dict[str, float]:
        """In all, and by phase."""
        return {"total": self.clock.total + sum(self.earlier.values()), **self._phases()}

    def _write_companions(self, folder: Path) -> None:
        copy_companions(self.plan.model, folder)
        write_text(folder / "config.json", json.dumps(self.plan.format.config(), indent=2) + "\n")
        for name, text in self.plan.format.files().items():
            write_text(folder / name, text)
