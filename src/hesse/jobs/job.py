"""Job: a command from a model folder to a new folder; the shared part of all commands that write one."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import read_json
from hesse.checkpoints.journal import Journal
from hesse.checkpoints.output import check_output, copy_companions, restore_replaced
from hesse.checkpoints.work_folder import WorkFolder, work_folder
from hesse.checkpoints.writer import WrittenPart, assemble, check_assembled, write_part, write_text
from hesse.data import Samples
from hesse.data.selection import Calibration
from hesse.errors import OptionError
from hesse.evaluation.evaluate import Evaluation, compare, pass_through
from hesse.jobs.identity import identity
from hesse.jobs.loader_check import check_loads
from hesse.jobs.model_card import CARD_FILE, model_card
from hesse.jobs.options import RunOptions
from hesse.networks.network import CheckpointNetwork
from hesse.passes.block_state import recall_states, record_states
from hesse.passes.stream import StreamBatch, evaluation_batch, take_up
from hesse.processes import join_process_group
from hesse.progress import Clock, Silence
from hesse.result import REPORT_FILE, LossChange, Report
from hesse.version import versions


class Job:
    """A command that reads the model folders `sources` and writes the folder `out`.

    A command checks its options, calls `begin`, works block by block with `steps`, calls `assemble` and `finish`. Its
    records in the `journal` outlive the process: a killed run resumes after the last record, and produces the same
    bytes. Nothing has the name `out` before `finish`.

        with Job("narrow", name, [folder], out, calibration, run) as job:
            job.begin([checkpoint], {"options": repr(request)}, needed_bytes)
            steps = job.steps("narrow", network, flows)
            ...
            job.assemble(config)
            return job.finish(Report(**job.head(...)))

    Raises:
        OutputError: `out` exists and may not be replaced, or cannot be written.
    """

    def __init__(
        self,
        command: str,
        name: str,  # of the model, as the user gave it
        sources: Sequence[Path],
        out: Path,
        calibration: Calibration,
        run: RunOptions,
        mark: str = "config.json",  # the file that a folder must have to be replaced
    ) -> None:
        self.command, self.name, self.sources, self.out = command, name, sources, out
        self.calibration, self.run = calibration, run
        self.clock, self.processes = Clock(), join_process_group(run.device)
        self.progress = run.progress if self.processes.is_main else Silence()
        self.notes: list[str] = []
        self.parts: list[WrittenPart] = []
        self._earlier: dict[str, float] = {}  # seconds by phase of processes that were killed
        self._stack = ExitStack()
        if self.processes.is_main:
            restore_replaced(out)
            for source in sources:
                check_output(out, source, run.overwrite, mark)

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def check_alone(self) -> None:
        """Raise OptionError if several processes were started for a command that one process runs."""
        if self.processes.world_size > 1:
            raise OptionError(f"`hesse {self.command}` runs in one process: start it without torchrun")

    def begin(
        self,
        checkpoints: Sequence[Checkpoint],
        request: Mapping[str, str],
        needed_bytes: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Lock the work folder, and create it or resume the same command's work in it.

        The result depends on `request`, `settings`, the checkpoints and the calibration only.

        Raises:
            OutputError: another process works there, another command was interrupted there, or the disk has less than
                `needed_bytes` free.
        """
        settings = {"device": self.run.device.type, "processes": self.processes.world_size, **(settings or {})}
        fingerprints = dict[str, str]()
        if self.processes.is_main:  # the only rank that compares them; the whole model is read for it
            with self.clock.phase("read"):
                fingerprints = identity(self.command, checkpoints, self.calibration, request, settings)
        self.work: WorkFolder = self._stack.enter_context(work_folder(self.out, self.processes))
        self.work.begin(fingerprints, needed_bytes, self.run.restart)

    @property
    def folder(self) -> Path:
        """Return the folder that becomes `out`."""
        return self.work.result

    @property
    def journal(self) -> Journal:
        """Return this rank's journal; other files in its folder are kept as long as the run."""
        return self.work.own

    @property
    def names(self) -> set[str]:
        """Return the names of the tensors that are written."""
        return {name for part in self.parts for name in part.checksums}

    def once(self, step: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the JSON value of `compute`, recorded as `step`, so that a resumed run recalls it."""
        content = self.journal.recall(step)
        if content is None:
            content = compute()
            self.journal.record(step, {**content, "seconds": self.phases()})
        else:
            self.resume_clock(content["seconds"])
        return content

    def steps(self, name: str, network: CheckpointNetwork, flows: list[StreamBatch]) -> "BlockSteps":
        """Return the blocks of `network` as steps named `name`, with `flows` after the last recorded one.

        The hidden states of `flows` are kept in a lasting TensorStore in the journal's folder; `flows` may be empty.
        """
        return BlockSteps(self, name, network, flows)

    def write(self, tensors: dict[str, Tensor], number: int | None = None) -> WrittenPart:
        """Write tensors of the result: as part `number`, which one of the ranks writes, or alone as the next part."""
        own = number is None or self.processes.writer(number) == self.processes.rank
        path = self.journal.folder / f"part-{len(self.parts)}.safetensors" if number is None else self.part_path(number)
        self.parts.append(write_part(path, tensors) if own else WrittenPart.of(path, tensors))
        return self.parts[-1]

    def write_rest(self, names: Iterable[str], read: Callable[[list[str]], dict[str, Tensor]]) -> None:
        """Write the tensors of `names` that no part has yet, each read by `read`, as parts of this rank."""
        done = self.names
        for name in names:
            if name not in done:
                self.write(read([name]))

    def part_path(self, number: int) -> Path:
        """Return the file of part `number`, in the folder of the rank that writes it."""
        return self.work.journals(self.processes.writer(number)) / f"part-{number}.safetensors"

    def assemble(self, config: Mapping[str, Any], files: Mapping[str, str] | None = None) -> list[str]:
        """Assemble the result from all parts, config.json, other `files` by name, and the model's companion files.

        Returns the notes on files of the model folder that were not copied, or are code.

        Raises:
            OutputError: the disk is full or cannot be written.
            VerificationError: a tensor reads back different from what was written.
        """
        assemble(self.parts, self.folder)
        check_assembled(self.parts, self.folder)
        notes = copy_companions(self.sources[-1], self.folder)
        for name, text in {"config.json": json.dumps(config, indent=2) + "\n", **(files or {})}.items():
            write_text(self.folder / name, text)
        return notes

    def compare(self, result: CheckpointNetwork, dense: CheckpointNetwork, check: Samples) -> Evaluation:
        """Evaluate the result against the dense model on the samples `check`, with one block of each in memory."""
        batches = check.batches(evaluation_batch(dense, check.longest))
        with self.clock.phase("verify"):
            passes = [
                pass_through(network, batches, self.progress, phase)
                for network, phase in ((result, "verify"), (dense, "dense model"))
            ]
            self.check_loads(result, dense.checkpoint, batches[0])
            return compare(result, passes[0], dense, passes[1], self.progress)

    def check_loads(self, result: CheckpointNetwork, source: Checkpoint, ids: Tensor) -> None:
        """Check that transformers makes of the result what Hesse reads, or note why it was not asked; see there."""
        if (why := check_loads(result, source, ids)) is not None:
            self.notes.append(f"not verified by transformers: {why}")

    def phases(self) -> dict[str, float]:
        """Return the seconds by phase, including those of killed processes."""
        now = self.clock.seconds
        return {phase: self._earlier.get(phase, 0.0) + now.get(phase, 0.0) for phase in {**now, **self._earlier}}

    def resume_clock(self, seconds: dict[str, float]) -> None:
        """Add the seconds by phase that an earlier process recorded."""
        self._earlier = seconds

    def head(self, bytes_before: int, bytes_after: int, loss: LossChange | None) -> dict[str, Any]:
        """Return the fields that all reports share."""
        return {
            "verb": self.command,
            "model": self.name,
            "out": str(self.out),
            "bytes_before": bytes_before,
            "bytes_after": bytes_after,
            "loss": loss,
            "seconds": {"total": self.clock.total + sum(self._earlier.values()), **self.phases()},
            "notes": self.notes,
            "versions": versions(),
        }

    def finish(self, report: Report, file: str = REPORT_FILE) -> None:
        """Write the report, and of a model its card, into the result, and rename the result to OUT."""
        if self.processes.is_main:
            if (self.folder / "config.json").is_file():
                config = read_json(self.folder / "config.json")
                code = any(self.folder.glob("modeling_*.py"))
                card = model_card(report, self.sources[0], config, self.calibration.data, code)
                write_text(self.folder / CARD_FILE, card)
            write_text(self.folder / file, json.dumps(report.to_dict(), indent=2) + "\n")
        self.work.finish()


class BlockSteps:
    """Blocks of a network as steps of a job; each is recorded with its tensors and the samples' hidden states.

    `done` holds the records of blocks that an earlier process finished; their parts already belong to the job, and the
    flows continue after them.
    """

    def __init__(self, job: Job, name: str, network: CheckpointNetwork, flows: list[StreamBatch]) -> None:
        self._job, self._name, self._flows = job, name, flows
        self.done = self._recall(network)

    def _recall(self, network: CheckpointNetwork) -> list[dict[str, Any]]:
        job, journal, notes = self._job, self._job.journal, list[dict[str, Any]]()
        while len(notes) < len(network.blocks):
            note = journal.recall(f"{self._name}-{len(notes)}")
            if note is None:
                break
            notes.append(note)
        count = job.processes.all_reduce_min(len(notes))
        while count and self._flows:
            states = recall_states(journal, self._hidden(count), network.device)
            if job.processes.all_reduce_min(states is not None) and states is not None:
                take_up(self._flows, states[0], count)
                break
            count -= 1
        for number, note in enumerate(notes[:count]):
            if note["part"] is not None:
                job.parts.append(WrittenPart(job.part_path(number), *note["part"]))
            job.resume_clock(note["seconds"])
        return [note["content"] for note in notes[:count]]

    def note(
        self,
        index: int,
        content: dict[str, Any],
        tensors: dict[str, Tensor] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        """Record that block number `index` is finished: `content` in JSON, and the result's `tensors` if there are any.

        `files` in the journal's folder belong to the record.
        """
        job, journal = self._job, self._job.journal
        with job.clock.phase("write"):
            part = None if tensors is None else job.write(tensors, index)
            if self._flows:
                record_states(journal, self._hidden(index + 1), [flow.waiting for flow in self._flows], {})
            own = part is not None and job.processes.writer(index) == job.processes.rank
            record = {
                "content": content,
                "part": None if part is None else [part.checksums, part.bytes],
                "seconds": job.phases(),
            }
            paths = [part.path, *files] if own and part is not None else files
            journal.record(f"{self._name}-{index}", record, paths)
            journal.forget(self._hidden(index - 1))

    def _hidden(self, number: int) -> str:
        return f"{self._name}-hidden-{number}"
