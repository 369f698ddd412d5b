"""`hesse estimate`: write a model's curvature to disk, block by block."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.locate import locate
from hesse.checkpoints.tensor_store import TensorStore
from hesse.checkpoints.writer import link_or_copy, write_tensors, writing
from hesse.curvature import Curvature, Diagonal, Gram, Kronecker
from hesse.data.selection import Calibration, Selection, sample_length, select_samples
from hesse.errors import OptionError
from hesse.estimation import Sums, save_curvature
from hesse.estimation.calibrated import Layers, calibrated_blocks
from hesse.estimation.probe import forward_walk, probe
from hesse.estimation.statistics import probe_tokens
from hesse.estimation.statistics_folder import INDEX_FILE, OUTPUT_FACTORS_FILE
from hesse.formats import open_networks
from hesse.jobs.forecast import Work, forecast, hidden_bytes, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import COMPARING, calibration_phases, comparison_phases, gradient_phases
from hesse.jobs.options import run_options
from hesse.networks.network import Block, CheckpointNetwork
from hesse.passes.backward import BackwardPass, BackwardState, layer_part
from hesse.passes.recorded_batch import RecordedBatch
from hesse.passes.stream import calibration_batch, start
from hesse.progress import Progress
from hesse.result import ForecastReport, Report, Result

EstimatedKind = Literal["gram", "kronecker", "fisher"]
KINDS: tuple[EstimatedKind, ...] = get_args(EstimatedKind)


@dataclass(frozen=True, kw_only=True)
class EstimateReport(Report):
    """Index of a folder of statistics: their model and samples, and the file of each layer by kind."""

    model_files: dict[str, str]  # SHA-256 by file
    samples: dict[str, Any]  # the calibration, that it can be read again
    samples_fingerprint: str
    tokens: int
    curvatures: dict[str, dict[str, str]]  # by kind and layer


def estimate(
    model: str | Path,
    out: str | Path,
    *,
    curvatures: Sequence[str] = ("gram",),
    data: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result[EstimateReport | ForecastReport]:
    """Estimate a model's curvature once, into a folder from which `compress` can try any number of schemes.

    The folder holds for each linear layer what `curvatures` names, E[ggᵀ] at its outputs, and fingerprints of model and
    data. "gram" is the second moment of the layer's inputs in the weights' own type, which `compress` needs;
    "kronecker" its K-FAC factors, from which `compress` and `inspect` predict; "fisher" the diagonal of the Fisher, of
    whole sequences. The latter two are the true Fisher with sampled labels, in nats per token, from a backward pass in
    float32.

    Args:
        model: a model folder, `default`, or a hub id; dense.
        out: the folder to write; it must not exist unless `overwrite`.
        curvatures: some of "gram", "kronecker" and "fisher".
        data: a text, JSON lines or parquet file, or a data set id; None for the shipped text.
        samples: calibration samples.
        length: tokens per sample; None for 2048 or the model's positions, whichever is less.
        seed: seed of the choice of samples and of sampled labels.
        batch_size: samples per batch.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: replace the statistics at `out`.
        restart: discard the work of an interrupted run to `out` instead of resuming it.
        dry_run: only estimate the bytes, memory and time of the run; write nothing.
        progress: receives each phase and step.

    Returns:
        The folder's index: the curvatures, their model and samples, and the seconds by phase.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do; nothing is left at `out`.
    """
    for kind in curvatures or [""]:
        if kind not in KINDS:
            raise OptionError(f"there is no curvature {kind!r} to estimate: use {', '.join(KINDS)}")
    if data is not None and not isinstance(data, str | Path):
        raise OptionError("statistics name their data, so that it can be read again: give a file, not token ids")
    kinds = [kind for kind in KINDS if kind in curvatures]
    calibration = Calibration(data, samples, length, seed, batch_size)
    run = run_options(device, None, overwrite, restart, dry_run, progress)
    source = locate(model)
    with Job("estimate", str(model), [source], Path(out), calibration, run, INDEX_FILE) as job:
        job.check_alone()
        with job.clock.phase("read"):
            checkpoint, dense, network = open_networks(source, run.device)
            factors = {layer.name: ("output factor",) for layer in network.layers}
            selected = select_samples(source, calibration, network, probe_tokens(factors, network.layers, 0))
        job.notes += selected.notes
        estimation = _Estimation(job, dense, network, selected, kinds)
        out_bytes = _most_bytes(network, kinds)
        streamed = (2 * len(network.blocks) + 8) * hidden_bytes(dense, tokens_of(selected.samples))
        if dry_run:
            return Result(estimation.forecast(out_bytes, 2 * out_bytes + streamed))
        job.begin([checkpoint], {"curvatures": " ".join(kinds)}, 2 * out_bytes + streamed)
        files = estimation.run()
        asked = {key: value for key, value in asdict(calibration).items() if key != "batch_size"}
        asked |= {"length": sample_length(network, length), "data": None if data is None else str(data)}
        # An earlier process may have been killed behind the index, which is no curvature.
        written = sum(path.stat().st_size for path in job.folder.glob("*.safetensors"))
        report = EstimateReport(
            **job.head(checkpoint.file_bytes, written, None),
            model_files=checkpoint.digests,
            samples=asked,
            samples_fingerprint=selected.samples.fingerprint(),
            tokens=sum(len(ids) for ids in selected.samples.ids),
            curvatures=files,
        )
        job.finish(report, INDEX_FILE)
    return Result(report)


def _most_bytes(network: CheckpointNetwork, kinds: Sequence[str]) -> int:
    """Return bytes that the files never exceed together."""
    shapes = [layer.weight.shape for layer in network.layers]
    each = {
        "gram": sum(columns**2 for _, columns in shapes),
        "kronecker": sum(rows**2 + columns**2 for rows, columns in shapes),
        "fisher": sum(rows * columns for rows, columns in shapes),
    }
    probed = 0 if "kronecker" in kinds else sum(rows**2 for rows, _ in shapes)
    return 4 * (probed + sum(each[kind] for kind in kinds))


@dataclass
class _Files:
    """Curvature files of a folder, by kind and layer, and their number."""

    kinds: dict[str, dict[str, str]]
    count: int = 0
    new: list[Path] = field(default_factory=list)  # since the last record

    def save(self, folder: Path, kind: EstimatedKind, curvature: Curvature) -> str:
        """Write a curvature below `folder`; return the name of its file."""
        self.count += 1
        name = f"{kind}-{self.count:05d}.safetensors"
        with writing(folder):
            save_curvature(curvature, folder / name)
        self.new.append(folder / name)
        return name

    def note(self, layers: Sequence[str]) -> tuple[dict[str, Any], list[Path]]:
        """Return the record of these layers, and its new files."""
        own = {kind: {name: files[name] for name in layers if name in files} for kind, files in self.kinds.items()}
        new, self.new = self.new, []
        return {"files": own, "count": self.count}, new

    def recall(self, content: dict[str, Any]) -> None:
        """Restore the state from the content that `note` returned."""
        for kind, files in content["files"].items():
            self.kinds[kind] |= files
        self.count = content["count"]


class _Estimation:
    """Run of an estimation: a backward pass, a probe of the loss and a forward pass, as the kinds require."""

    def __init__(
        self,
        job: Job,
        dense: CheckpointNetwork,
        network: CheckpointNetwork,
        selected: Selection,
        kinds: list[EstimatedKind],
    ) -> None:
        self.job, self.dense, self.network, self.kinds = job, dense, network, kinds
        self.samples, self.probes = selected.samples, selected.probes
        self.batch_size = job.calibration.batch_size or calibration_batch(self.samples.longest)
        self.files = _Files({kind: {} for kind in kinds})

    def forecast(self, out_bytes: int, needed: int) -> ForecastReport:
        """Return the forecast of the run."""
        network, kinds, tokens, length = self.network, self.kinds, tokens_of(self.samples), self.samples.longest
        outside = comparison_phases(self.dense, length)[COMPARING]
        single = length if "fisher" in kinds else self.batch_size * length
        phases = {"hold the embeddings and the head": outside, **gradient_phases(self.dense, single, self._held_bytes)}
        if "gram" in kinds:
            summed = {layer.name: 0 for layer in network.layers}
            phases |= calibration_phases("calibrate", network, tokens, self.batch_size * length, summed)
        passed = 0 if "kronecker" in kinds else tokens_of(self.probes)
        passed += tokens if {"kronecker", "fisher"} & set(kinds) else 0
        work = Work(
            after=out_bytes,
            disk=needed,
            phases=phases,
            forward=passed,
            calibrated=tokens if "gram" in kinds else 0,
            backward=passed,
            bytes=6 * network.checkpoint.file_bytes + out_bytes,
        )
        return forecast(self.job, network, self.samples, work)

    def _held_bytes(self, block: Block) -> int:
        """Return the bytes of the sums that a backward pass over a block fills."""
        shapes = [layer.weight.shape for layer in block.layers]
        copies = {"kronecker": 2, "fisher": 3}
        held = sum(4 * copies.get(kind, 0) * self._numbers(kind, shape) for kind in self.kinds for shape in shapes)
        return held + (0 if "kronecker" in self.kinds else sum(4 * rows**2 for rows, _ in shapes))

    def _numbers(self, kind: str, shape: torch.Size) -> int:
        """Return the number of entries of a curvature of a weight of `shape` (out, in)."""
        rows, columns = shape
        return rows**2 + columns**2 if kind == "kronecker" else rows * columns

    def run(self) -> dict[str, dict[str, str]]:
        """Estimate everything; return the file of each layer by kind."""
        job = self.job
        backward: list[EstimatedKind] = [kind for kind in self.kinds if kind != "gram"]
        factors = self._backward_pass(backward) if backward else {}
        if "kronecker" not in self.kinds:
            factors = self._probe()
        if "gram" in self.kinds:
            self._forward_pass()
        with job.clock.phase("write"), writing(job.out):
            for name in {name for files in self.files.kinds.values() for name in files.values()}:
                link_or_copy(job.journal.folder / name, job.folder / name)
            write_tensors(job.folder / OUTPUT_FACTORS_FILE, factors)
        return self.files.kinds

    def _probe(self) -> dict[str, Tensor]:
        """Return E[ggᵀ] at the layers' outputs, from some of the samples."""
        job = self.job
        job.progress.begin("probe the loss", 2 * len(self.network.blocks) + 1)
        needs = {layer.name: ("output factor",) for layer in self.network.layers}
        seed, folder, step = job.calibration.seed, job.journal.folder, job.progress.advance
        known = probe(self.network, self.probes, needs, folder, seed, job.clock, step, job.journal)
        return {layer: statistics["output factor"]() for layer, statistics in known.items()}

    def _forward_pass(self) -> None:
        """Write the Gram of each layer's inputs; layers with the same inputs have one file."""
        job, network = self.job, self.network
        job.progress.begin("estimate", len(network.blocks))
        with job.clock.phase("calibrate"):
            store = TensorStore(job.journal.folder, "calibration", lasting=True)
            batches = start(network, self.samples.batches(self.batch_size), store)
        steps, needs = job.steps("gram", network, batches), {layer.name: ("inputs",) for layer in network.layers}
        for content in steps.done:
            self.files.recall(content)
            job.progress.advance()
        blocks = calibrated_blocks(network, batches, needs, first=len(steps.done), clock=job.clock)
        for index, (block, layers) in enumerate(blocks, len(steps.done)):
            with job.clock.phase("write"):
                self._save_grams(layers)
            content, files = self.files.note([layer.name for layer in block.layers])
            steps.note(index, content, files=files)
            job.progress.advance()

    def _save_grams(self, layers: Layers) -> None:
        last: tuple[Gram, str] | None = None  # the Gram that was written last, and its file
        for layer, statistics in layers:
            if not statistics.called:
                continue
            if last is None or statistics.gram is not last[0]:
                last = statistics.gram, self.files.save(self.job.journal.folder, "gram", statistics.gram)
            self.files.kinds["gram"][layer.name] = last[1]

    def _backward_pass(self, kinds: list[EstimatedKind]) -> dict[str, Tensor]:
        """Write Kronecker factors and Fisher diagonals block by block; return the diagonals of the output factors."""
        job, dense, journal = self.job, self.dense, self.job.journal
        job.progress.begin("backward pass", 2 * len(dense.blocks) + 1)
        single = "fisher" in kinds  # it needs gradients of single samples, which experts mix
        with job.clock.phase("probe"):
            store = TensorStore(journal.folder, "forward", lasting=True)
            batches = start(dense, self.samples.batches(1 if single else self.batch_size), store)
        inputs = forward_walk(dense, batches, batches, job.clock, job.progress.advance, journal)
        diagonals: dict[str, Tensor] = {}
        with job.clock.phase("probe"):
            state = self._recall_backward(diagonals)
            store = TensorStore(journal.folder, "backward-gradient", lasting=True)
            backward = BackwardPass(dense, batches, inputs, job.calibration.seed, single, store, state)
            for _ in range(1 + len(dense.blocks) - backward.state.reached):
                job.progress.advance()
            for block, recorded in backward:
                found = self._save_estimates(block, recorded, backward, kinds)
                self._note_backward(block, backward.state, backward.scale, found)
                diagonals |= found
                job.progress.advance()
        return diagonals

    def _save_estimates(
        self, block: Block, recorded: Iterator[RecordedBatch], backward: BackwardPass, kinds: list[EstimatedKind]
    ) -> dict[str, Tensor]:
        """Write the curvatures of a block's layers; return the diagonals of their output factors."""
        parts = {layer.name: [layer_part(layer)] for layer in block.layers}
        sums = Sums(parts, {layer.name: layer.parameter for layer in block.layers}, kinds)
        for batch in recorded:
            sums.add(batch)
        sums.leave_out_unreached()
        estimates = sums.estimates(backward.scale, backward.origin.matrix, backward.origin.unit)
        diagonals = {}
        folder = self.job.journal.folder
        for name in parts:
            with self.job.clock.phase("write"):
                if isinstance(kronecker := estimates.kronecker.get(name), Kronecker):
                    self.files.kinds["kronecker"][name] = self.files.save(folder, "kronecker", kronecker)
                    diagonals[name] = kronecker.output_factor.diagonal().clone()  # a view would keep the whole factor
                if isinstance(fisher := estimates.fisher.get(name), Diagonal):
                    self.files.kinds["fisher"][name] = self.files.save(folder, "fisher", fisher)
        return diagonals

    def _note_backward(self, block: Block, state: BackwardState, scale: float, diagonals: dict[str, Tensor]) -> None:
        """Record that the backward pass has finished a block."""
        journal, reached = self.job.journal, state.reached
        with self.job.clock.phase("write"):
            content, files = self.files.note([layer.name for layer in block.layers])
            path = journal.folder / f"backward-{reached}.safetensors"
            with writing(journal.folder):
                write_tensors(path, diagonals)
            seconds = self.job.phases()
            journal.record(f"backward-{reached}", {**content, "seconds": seconds}, [*files, path])
            journal.record_tensors(f"backward-gradient-{reached}", state.gradients, {"scale": scale})
            journal.forget(f"backward-gradient-{reached + 2}")

    def _recall_backward(self, diagonals: dict[str, Tensor]) -> BackwardState | None:
        """Return the state of an earlier process's backward pass, and restore its results."""
        journal, last = self.job.journal, len(self.dense.blocks)
        notes, reached = list[dict[str, Any]](), last
        while reached and (note := journal.recall(f"backward-{reached - 1}")) is not None:
            notes.append(note)
            reached -= 1
        gradients = None
        while reached < last:
            gradients = journal.recall_tensors(f"backward-gradient-{reached}", self.dense.device)
            if gradients is not None:
                break
            notes.pop()
            reached += 1
        for number, note in zip(range(last - 1, reached - 1, -1), notes, strict=True):
            self.files.recall(note)
            self.job.resume_clock(note["seconds"])
            diagonals |= load_file(journal.folder / f"backward-{number}.safetensors")
        return None if gradients is None else BackwardState(reached, gradients[1]["scale"], gradients[0])
