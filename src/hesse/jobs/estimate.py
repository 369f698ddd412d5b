"""`hesse estimate`: write a model's curvature to disk, block by block."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from hesse.checkpoints.writer import link_or_copy, write_tensors, writing
from hesse.curvature import Gram
from hesse.data.selection import Calibration, sample_length
from hesse.errors import OptionError
from hesse.estimation.calibrated import Layers
from hesse.estimation.statistics import probe_tokens
from hesse.estimation.statistics_folder import INDEX_FILE, OUTPUT_FACTORS_FILE
from hesse.formats import open_networks
from hesse.jobs.estimate_backward import EstimatedKind, Files, estimate_backward, write_curvature
from hesse.jobs.forecast import Work, hidden_bytes, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import COMPARING, calibration_phases, comparison_phases, gradient_phases
from hesse.jobs.options import run_options
from hesse.jobs.recorded_blocks import BlockRecord
from hesse.jobs.task import Task, run_task
from hesse.networks.network import Block, CheckpointNetwork
from hesse.progress import Progress
from hesse.result import ForecastReport, Report, Result

KINDS: tuple[EstimatedKind, ...] = get_args(EstimatedKind)
# Entries of a curvature of a weight (out, in), by kind.
NUMBERS: dict[str, Callable[[int, int], int]] = {
    "gram": lambda rows, columns: columns**2,
    "kronecker": lambda rows, columns: rows**2 + columns**2,
    "fisher": lambda rows, columns: rows * columns,
}


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
    bos: bool | None = None,
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
        bos: start windows of text with BOS, or not; None for what the tokenizer does.
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
    calibration = Calibration(data, samples, length, seed, batch_size, bos)
    run = run_options(device, None, overwrite, restart, dry_run, progress)
    request = {"curvatures": " ".join(kinds)}
    return run_task(
        "estimate",
        [model],
        Path(out),
        calibration,
        run,
        request,
        lambda job: _Estimation(job, kinds),
        INDEX_FILE,
        INDEX_FILE,
    )


def _most_bytes(network: CheckpointNetwork, kinds: Sequence[str]) -> int:
    """Return bytes that the files never exceed together."""
    shapes = [layer.weight.shape for layer in network.layers]
    probed = 0 if "kronecker" in kinds else sum(rows**2 for rows, _ in shapes)
    return 4 * (probed + sum(NUMBERS[kind](*shape) for kind in kinds for shape in shapes))


class _Estimation(Task[EstimateReport]):
    """A backward pass, a probe of the loss and a forward pass, as the kinds require."""

    def __init__(self, job: Job, kinds: list[EstimatedKind]) -> None:
        _, self.dense, network = open_networks(job.sources[0], job.run.device)
        self.kinds, self.backward = kinds, [kind for kind in kinds if kind != "gram"]
        self.factors = {layer.name: ("output factor",) for layer in network.layers}
        super().__init__(job, network, probe_tokens(self.factors, network.layers, 0))
        self.out_bytes = _most_bytes(network, kinds)
        streamed = (2 * len(network.blocks) + 8) * hidden_bytes(self.dense, tokens_of(self.selected.samples))
        self.needed_bytes = 2 * self.out_bytes + streamed

    def work(self) -> Work:
        network, kinds, tokens = self.network, self.kinds, tokens_of(self.selected.samples)
        length = self.selected.samples.longest
        outside = comparison_phases(self.dense, length)[COMPARING]
        single = length if "fisher" in kinds else self.batch_size * length
        phases = {"hold the embeddings and the head": outside, **gradient_phases(self.dense, single, self._held_bytes)}
        if "gram" in kinds:
            summed = {layer.name: 0 for layer in network.layers}
            phases |= calibration_phases("calibrate", network, tokens, self.batch_size * length, summed)
        passed = 0 if "kronecker" in kinds else tokens_of(self.selected.probes)
        passed += tokens if self.backward else 0
        return Work(
            after=self.out_bytes,
            disk=self.needed_bytes,
            phases=phases,
            forward=passed,
            calibrated=tokens if "gram" in kinds else 0,
            backward=passed,
            bytes=6 * network.checkpoint.file_bytes + self.out_bytes,
        )

    def _held_bytes(self, block: Block) -> int:
        """Return the bytes of the sums that a backward pass over a block fills."""
        shapes = [layer.weight.shape for layer in block.layers]
        copies = {"kronecker": 2, "fisher": 3}
        held = sum(4 * copies[kind] * NUMBERS[kind](*shape) for kind in self.backward for shape in shapes)
        return held + (0 if "kronecker" in self.kinds else sum(4 * rows**2 for rows, _ in shapes))

    def run(self) -> EstimateReport:
        job, network, samples = self.job, self.network, self.selected.samples
        files: Files = {}
        factors: dict[str, Tensor] = {}
        if self.backward:
            # Fisher diagonals need gradients of single samples, which experts mix.
            batches = samples.batches(1 if "fisher" in self.kinds else self.batch_size)
            files, factors = estimate_backward(job, self.dense, batches, self.backward)
        if "kronecker" not in self.kinds:
            known = self.probe(network, self.factors)
            factors = {layer: statistics["output factor"]() for layer, statistics in known.items()}
        if "gram" in self.kinds:
            files = {"gram": self._write_grams(sum(len(own) for own in files.values())), **files}
        names = {name for own in files.values() for name in own.values()}
        with job.clock.phase("write"), writing(job.out):
            for name in names:
                link_or_copy(job.journal.folder / name, job.folder / name)
            write_tensors(job.folder / OUTPUT_FACTORS_FILE, factors)
        data = job.calibration.data
        asked = {key: value for key, value in asdict(job.calibration).items() if key != "batch_size"}
        asked |= {"length": sample_length(network, asked["length"]), "data": None if data is None else str(data)}
        # An earlier process may have been killed behind the index, which is no curvature.
        written = sum(path.stat().st_size for path in job.folder.glob("*.safetensors"))
        return EstimateReport(
            **job.head(network.checkpoint.file_bytes, written, None),
            model_files=network.checkpoint.digests,
            samples=asked,
            samples_fingerprint=samples.fingerprint(),
            tokens=tokens_of(samples),
            curvatures=files,
        )

    def _write_grams(self, before: int) -> dict[str, str]:
        """Write the Gram of each layer's inputs, behind `before` files; return the file of each layer.

        Layers with the same inputs have one file.
        """
        folder, clock = self.job.journal.folder, self.job.clock

        def write(block: Block, layers: Layers, done: Sequence[dict[str, str]]) -> BlockRecord:
            number = before + len({name for files in done for name in files.values()})
            last: Gram | None = None
            files: dict[str, str] = {}
            for layer, statistics in layers:
                if not statistics.called:
                    continue
                if statistics.gram is not last:
                    last, number = statistics.gram, number + 1
                    with clock.phase("write"):
                        name = write_curvature(last, folder, "gram", number)
                files[layer.name] = name
            return BlockRecord(files, files=[folder / name for name in dict.fromkeys(files.values())])

        needs = {layer.name: ("inputs",) for layer in self.network.layers}
        records = self.solve_blocks("estimate", needs, write)
        return {layer: name for files in records for layer, name in files.items()}
