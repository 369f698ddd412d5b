"""`hesse repair`: add the best low rank to each layer of a compressed checkpoint from any program."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.locate import locate
from hesse.checkpoints.tensor_store import TensorStore
from hesse.constraints import LowRank, LowRankCode
from hesse.data.selection import Calibration, Data, Selection, select_samples
from hesse.errors import OptionError, VerificationError
from hesse.estimation.calibrated import KnownStatistics, Layers, LayerStatistics, calibrated_blocks
from hesse.estimation.probe import check_pass, probe
from hesse.estimation.statistics import probe_tokens
from hesse.estimation.statistics.output_factor import output_factor
from hesse.formats import open_checkpoint
from hesse.formats.adapter import CONFIG, AdaptedCheckpoint, check_adaptable, layer_paths, write_adapter
from hesse.jobs.forecast import Work, forecast, hidden_bytes, tokens_at_once, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import calibration_phases, comparison_phases, gradient_phases
from hesse.jobs.options import run_options
from hesse.jobs.repair_pair import Pair
from hesse.jobs.repair_report import RepairedLayer, RepairReport
from hesse.jobs.verify import read_back
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, effect
from hesse.layerwise.solved_layer import digest
from hesse.layerwise.workspace import layer_bytes
from hesse.methods import METHODS, Options, Rule
from hesse.networks.network import Block, Layer
from hesse.passes.stream import StreamBatch, calibration_batch, evaluation_batch, start
from hesse.progress import Progress
from hesse.result import ForecastReport, Result

FORMATS = ("adapter", "dense")
LEFT, RIGHT = ".left", ".right"  # suffixes of a layer's name: the factors that a run for an adapter keeps


@dataclass(frozen=True)
class RepairRequest:
    """The low rank to add.

    Raises:
        OptionError: a value is invalid.
    """

    rank: int
    curvature: str = "gram"
    format: str = "adapter"
    damping: float = 0.01
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        LowRank(self.rank)
        curvatures = METHODS["repair"].curvatures
        for option, value, known in (("--curvature", self.curvature, curvatures), ("--format", self.format, FORMATS)):
            if value not in known:
                raise OptionError(f"{option} is {value!r}: use {', '.join(known)}")
        if not 0 <= self.damping <= 1e4:
            raise OptionError(f"--damping is {self.damping}, but must be between 0 and 10000; 0.01 is usual")

    def rule(self) -> Rule:
        """Return the row of the table as a recipe's rule, with the requested curvature."""
        (rule,) = METHODS["repair"].recipe(Options(rank=self.rank, damping=self.damping)).rules
        return rule.model_copy(update={"curvature": self.curvature})


def repair(
    dense: str | Path,
    compressed: str | Path,
    out: str | Path,
    *,
    rank: int = 32,
    curvature: str = "gram",
    format: str = "adapter",
    damping: float = 0.01,
    ignore: Sequence[str] = (),
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
) -> Result[RepairReport | ForecastReport]:
    """Add to each layer of a compressed model the best low rank of its error against the dense model, without training.

    For a layer's error E = W - W_c the factors are min ‖G^½ (E - LR) A^½‖ in closed form: A is of the inputs that the
    layer has in the repaired model, all layers before it repaired, and G is the output factor, with the curvature
    "kronecker". EoRA (Liu et al., 2024) has G = I, LoRC (Yao et al., 2023) A = I as well.

    Args:
        dense: the model that was compressed: a folder, `default`, or a hub id.
        compressed: the compressed model, from Hesse or any program that writes dense or compressed-tensors checkpoints.
        out: the folder to write; it must not exist unless `overwrite`.
        rank: rank of the factors, the same for each layer.
        curvature: the metric of the low rank: "gram", each layer's outputs (EoRA, Liu et al., 2024,
            arXiv:2410.21271); "kronecker", the end loss; "identity", the weights (LoRC, Yao et al., 2023,
            arXiv:2303.08302).
        format: "adapter" for a LoRA folder in PEFT's layout, to load on top of the unchanged `compressed`; "dense" for
            an ordinary checkpoint of the sums, as large as the dense model.
        damping: share of the Gram's mean eigenvalue that is added to it.
        ignore: patterns of layers to leave unchanged.
        data: a text, JSON lines or parquet file, a datasets id, or lists of token ids; None for the shipped text.
        samples: calibration samples, which go through the compressed model.
        length: tokens per sample; None for 2048 or the model's positions, whichever is less.
        seed: seed of the choice of samples and of sampled labels.
        batch_size: samples per batch.
        device: `auto`, `cpu`, or `cuda`.
        overwrite: replace an adapter or a model folder at `out`.
        restart: discard the work of an interrupted run to `out` instead of resuming it.
        dry_run: only estimate the bytes, memory and time of the run; write nothing.
        progress: receives each phase and step.

    Returns:
        Losses before and after, predicted and measured, in nats per token, for the model and predicted for each layer.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do; nothing is left at `out`.
    """
    request = RepairRequest(rank, curvature, format, damping, tuple(ignore))
    calibration = Calibration(data, samples, length, seed, batch_size)
    run = run_options(device, None, overwrite, restart, dry_run, progress)
    sources = [locate(dense), locate(compressed)]
    mark = CONFIG if format == "adapter" else "config.json"
    with Job("repair", str(dense), sources, Path(out), calibration, run, mark) as job:
        job.check_alone()
        with job.clock.phase("read"):
            pair = Pair.open(sources[0], sources[1], rank, request.ignore, run.device)
            if format == "adapter":
                check_adaptable(layer.name for layer in pair.layers)
            probed = probe_tokens(_needs(pair.layers, request), pair.layers, 0)
            selected = select_samples(sources[0], calibration, pair.network, probed)
        needed = pair.source.file_bytes * (1 if format == "adapter" else 3)
        needed += (len(pair.network.blocks) + 8) * hidden_bytes(pair.network, tokens_of(selected.samples))
        repair = _Repair(job, pair, request, selected, str(compressed))
        if dry_run:
            return Result(repair.forecast(needed))
        job.begin([pair.source, pair.network.checkpoint], {"options": repr(request)}, needed)
        report = repair.run()
        job.finish(report)
    return Result(report)


def _needs(layers: Iterable[Layer], request: RepairRequest) -> dict[str, tuple[str, ...]]:
    """Return the statistics of the layers: the Gram of their inputs, and the output factor or its diagonal."""
    needed = ("inputs", "output factor" if request.curvature == "kronecker" else "output diagonal")
    return {layer.name: needed for layer in layers}


class _Repair:
    """Run of a repair: the dense model's pass, repairing each layer as the samples reach it, and the measurement."""

    def __init__(self, job: Job, pair: Pair, request: RepairRequest, selected: Selection, compressed: str) -> None:
        self.job, self.pair, self.request, self.selected = job, pair, request, selected
        self.compressed = compressed  # as the user named it
        self.digests: dict[str, str] = {}  # of each repaired weight
        self.layers: list[RepairedLayer] = []
        self.notes: list[str] = []

    def forecast(self, needed: int) -> ForecastReport:
        """Return the forecast of the run."""
        pair, samples, request = self.pair, self.selected.samples, self.request
        batch, tokens, probed = tokens_at_once(self.job, samples), tokens_of(samples), tokens_of(self.selected.probes)
        whole, solver = request.curvature == "kronecker", LayerSolver()
        repaired = {pair.twins[layer.name] for layer in pair.layers} if whole else set[str]()

        def factors(block: Block) -> int:
            return sum(4 * layer.weight.shape[0] ** 2 for layer in block.layers if layer.name in repaired)

        def solve(layer: Layer, statistics: LayerStatistics) -> object:
            factor = {"output factor": torch.eye(layer.weight.shape[0])} if whole else {}
            return self._solve_layer(layer, {**statistics, **factor}, solver)

        probing = min(calibration_batch(samples.longest) * samples.longest, batch)
        workspace = {layer.name: self._workspace(layer) for layer in pair.layers}
        compressed, dense = pair.network.checkpoint.file_bytes, pair.source.file_bytes
        added = sum(request.rank * sum(x.weight.shape) * pair.dtype(x.name).itemsize for x in pair.layers)
        adapter = request.format == "adapter"
        work = Work(
            after=compressed + added if adapter else dense,
            out=added if adapter else dense,
            disk=needed,
            phases={
                **comparison_phases(pair.dense, samples.longest),
                **gradient_phases(pair.probed, probing, factors),
                **calibration_phases("repair", pair.network, tokens, batch, workspace),
            },
            forward=3 * tokens_of(self.selected.check) + probed,
            calibrated=tokens,
            backward=probed,
            bytes=4 * (compressed + dense),
            layers={layer.name: layer.weight.shape for layer in pair.layers},
            solve=solve,
        )
        return forecast(self.job, pair.network, samples, work)

    def _workspace(self, layer: Layer) -> int:
        """Return the bytes that repairing a layer holds, the dense and the compressed weight included."""
        rule, shape = self.request.rule(), layer.weight.shape
        constraint, samples = LowRank(self.request.rank), len(self.selected.probes.ids)
        return 8 * shape.numel() + layer_bytes(rule, constraint, shape, rule.kind.needs | {"inputs"}, samples)

    def run(self) -> RepairReport:
        """Do everything except renaming the result to OUT."""
        pair, job = self.pair, self.job
        flows = self._dense_flows()
        self._repair_blocks(self._output_factors())
        if not self.digests:
            raise OptionError(
                f"{self.compressed} lacks nothing of {job.name} in the layers to be repaired: leave it as it is"
            )
        with job.clock.phase("write"):
            result = self._write()
        with job.clock.phase("verify"):
            evaluations = (
                read_back(pair.network.checkpoint, pair.dense, flows, {}, job.progress),
                read_back(result, pair.dense, flows, self.digests, job.progress),
            )
        predicted = [sum(getattr(x, f"predicted_{when}") or 0.0 for x in self.layers) for when in ("before", "after")]
        before, after = (
            evaluation.loss_change("repaired", self.selected.held_out, loss)
            for evaluation, loss in zip(evaluations, predicted, strict=True)
        )
        self._check([evaluation.difference for evaluation in evaluations], predicted)
        job.notes = [*self.selected.notes, *self.notes]
        size = pair.network.checkpoint.file_bytes
        return RepairReport(
            **job.head(size, result.file_bytes, after),
            method=self.request.curvature,
            compressed=self.compressed,
            format=self.request.format,
            rank=self.request.rank,
            bytes_added=result.file_bytes - size,
            loss_before=before,
            layers=self.layers,
        )

    def _check(self, measured: list[float], predicted: list[float]) -> None:
        """Refuse a repair that made the model worse although it was predicted to help; note one that did not help."""
        if measured[1] <= measured[0]:
            return
        if predicted[1] < predicted[0] / 2:
            raise VerificationError(
                f"the repaired model is {measured[1]:.4g} nats per token from the dense one, and the compressed one "
                f"{measured[0]:.4g}: nothing was put in place; give more samples, or another --curvature"
            )
        self.notes.append("the repair did not bring the model nearer to the dense one on the samples measured on")

    def _dense_flows(self) -> list[StreamBatch]:
        """Return where the check samples end in the dense model."""
        network, check, job = self.pair.dense, self.selected.check, self.job
        job.progress.begin("dense model", len(network.blocks))
        batches = check.batches(evaluation_batch(network, check.longest))
        return check_pass(network, batches, job.clock, job.progress.advance, job.journal)

    def _output_factors(self) -> KnownStatistics:
        """Collect the output factors of the dense layers, by the layers' names in the compressed model."""
        network, job = self.pair.probed, self.job
        job.progress.begin("probe the loss", 2 * len(network.blocks) + 1)
        known = probe(
            network,
            self.selected.probes,
            _needs(network.layers, self.request),
            job.journal.folder,
            job.calibration.seed,
            job.clock,
            job.progress.advance,
            job.journal,
        )
        return {name: known[twin] for name, twin in self.pair.twins.items() if twin in known}

    def _repair_blocks(self, known: KnownStatistics) -> None:
        """Take the samples through the compressed model; repair, write and note one block after another."""
        network, samples, job = self.pair.network, self.selected.samples, self.job
        job.progress.begin("repair", len(network.blocks))
        size = job.calibration.batch_size or calibration_batch(samples.longest)
        with job.clock.phase("calibrate"):
            store = TensorStore(job.journal.folder, "calibration", lasting=True)
            batches = start(network, samples.batches(size), store)
        steps, needs = job.steps("block", network, batches), _needs(self.pair.layers, self.request)
        for content in steps.done:
            layers = [RepairedLayer(**{**layer, "shape": tuple(layer["shape"])}) for layer in content["layers"]]
            self._add(layers, content["digests"], content["notes"])
        solver = LayerSolver()
        blocks = calibrated_blocks(network, batches, needs, known=known, first=len(steps.done), clock=job.clock)
        for index, (block, statistics_of) in enumerate(blocks, len(steps.done)):
            solutions = self._solve(statistics_of, solver)
            layers = [solution.layer for solution in solutions]
            digests = {solution.layer.name: solution.digest for solution in solutions}
            notes = [note for solution in solutions for note in solution.notes]
            content = {"layers": [asdict(layer) for layer in layers], "digests": digests, "notes": notes}
            steps.note(index, content, self._tensors(block, solutions))
            self._add(layers, digests, notes)

    def _add(self, layers: list[RepairedLayer], digests: dict[str, str], notes: list[str]) -> None:
        self.layers += layers
        self.digests |= digests
        self.notes += notes
        self.job.progress.advance()

    def _solve(self, layers: Layers, solver: LayerSolver) -> list["_RepairedWeight"]:
        """Repair the layers of a loaded block, and return those that lacked anything."""
        names = {layer.name for layer in self.pair.layers}
        solutions = []
        for layer, statistics in layers:
            if layer.name in names:
                with self.job.clock.phase("solve"):
                    solution = self._solve_layer(layer, dict(statistics), solver)
                solutions += [] if solution is None else [solution]
        return solutions

    def _solve_layer(
        self, layer: Layer, statistics: Mapping[str, Any], solver: LayerSolver
    ) -> "_RepairedWeight | None":
        """Solve for one layer's factors, and put the sum in its place; None if the layer lacks nothing."""
        name, dense = layer.name, self.request.format == "dense"
        target, present = self.pair.weights(layer)
        lacking = target - present
        if not lacking.any():
            return None
        constraint = LowRank(self.request.rank, dtype=torch.float32 if dense else self.pair.dtype(name))
        problem = LayerProblem(name, lacking, statistics, self.request.rule(), constraint)
        solved, gram = solver.solve(problem), problem.gram
        # As a reader multiplies them: on the CPU, since another device rounds its sums otherwise.
        code: LowRankCode = solved.solution.encoded
        left, right = (factor.cpu().contiguous() for factor in (code.left, code.right))
        stored = present.cpu() + left @ right
        repaired = (stored.to(self.pair.dtype(name)).float() if dense else stored).to(target)
        layer.replace(repaired)
        whole = 2 * gram.quadratic(target)  # E‖W x‖²
        factor = output_factor(statistics) if gram.tokens else None
        before, after = effect(lacking, gram, factor), effect(repaired - target, gram, factor)
        report = RepairedLayer(
            name=name,
            shape=(target.shape[0], target.shape[1]),
            method=solved.method,
            tokens=gram.tokens,
            damping=solved.damping,
            predicted_before=before.loss_increase,
            predicted_after=after.loss_increase,
            output_error_before=before.squared_error / whole if whole > 0 else None,
            output_error_after=after.squared_error / whole if whole > 0 else None,
        )
        return _RepairedWeight(report, digest(repaired), solved.notes, layer.parameter, LowRankCode(left, right))

    def _tensors(self, block: Block, solutions: list["_RepairedWeight"]) -> dict[str, Tensor]:
        """Return what is kept of a block: its dense tensors, or for an adapter the factors of its repaired layers."""
        if self.request.format == "dense":
            repaired = {solution.layer.name: solution.parameter for solution in solutions}
            return self._dense_tensors(self.pair.network.stored_in(block), repaired)
        sides = ((LEFT, "left"), (RIGHT, "right"))
        return {x.layer.name + end: getattr(x.factors, side) for x in solutions for end, side in sides}

    def _dense_tensors(self, names: Iterable[str], repaired: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the tensors `names` of the compressed checkpoint decoded, with the weights of `repaired` layers."""
        tensors = self.pair.network.checkpoint.read(names)
        for name, tensor in tensors.items():
            layer = name.removesuffix(".weight")
            if layer in self.pair.twins:
                tensors[name] = (repaired or {}).get(layer, tensor).to(self.pair.dtype(layer))
        return tensors

    def _write(self) -> Checkpoint:
        """Write the adapter, or the rest of a dense checkpoint, and open the result."""
        network, job = self.pair.network, self.job
        if self.request.format == "adapter":
            factors = self._factors()
            write_adapter(job.folder, network, factors, self.pair.dtype, self.request.rank, self.compressed)
            return AdaptedCheckpoint(network.checkpoint.folder, job.folder, layer_paths(network))
        job.write_rest(network.checkpoint.names(), self._dense_tensors)
        config = {key: value for key, value in network.checkpoint.config.items() if key != "quantization_config"}
        self.notes += job.assemble(config)
        return open_checkpoint(job.folder)

    def _factors(self) -> dict[str, LowRankCode]:
        """Return the factors of all repaired layers, by the layers' names."""
        tensors = {name: tensor for part in self.job.parts for name, tensor in load_file(part.path).items()}
        return {name: LowRankCode(tensors[name + LEFT], tensors[name + RIGHT]) for name in self.digests}


@dataclass(frozen=True, eq=False)
class _RepairedWeight:
    """A layer with its low rank added."""

    layer: RepairedLayer
    digest: str  # of the repaired weight
    notes: list[str]
    parameter: Tensor  # the repaired weight as the module keeps it
    factors: LowRankCode
