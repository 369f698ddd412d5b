"""`hesse repair`: the best low rank beside each layer of a compressed checkpoint, whoever compressed it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.output import check_output, copy_companions, temporary_folder
from hesse.checkpoints.writer import Parts, write_text
from hesse.constraints import LowRank, LowRankCode
from hesse.data.selection import Calibration, Selection, select_samples
from hesse.errors import OptionError, VerificationError
from hesse.estimation.calibrated import Known, calibrated_blocks
from hesse.estimation.probe import check_pass, probe
from hesse.estimation.statistics import probe_tokens
from hesse.estimation.statistics.output_factor import output_factor
from hesse.formats import open_checkpoint
from hesse.formats.adapter import CONFIG, AdaptedCheckpoint, check_adaptable, layer_paths, write_adapter
from hesse.jobs.build_report import versions
from hesse.jobs.repair_pair import Pair
from hesse.jobs.repair_report import RepairedLayer, RepairReport
from hesse.jobs.verify import read_back
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, digest, effect
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import LowRankOptions
from hesse.methods.recipe import Rule
from hesse.methods.solver_options import SolverOptions
from hesse.networks.network import Block, Layer
from hesse.passes.batch_sizes import evaluation_batch
from hesse.passes.stream import StreamBatch, calibration_batch, start
from hesse.progress import Clock, Progress

REPORT_FILE = "repair.json"
FORMATS = ("adapter", "dense")
CURVATURES = ("gram", "kronecker", "identity")


@dataclass(frozen=True)
class RepairRequest:
    """What is asked for.

    Raises:
        OptionError: a value has no meaning.
    """

    rank: int
    curvature: str = "gram"
    format: str = "adapter"
    damping: float = 0.01
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        LowRank(self.rank)
        for option, value, known in (("--curvature", self.curvature, CURVATURES), ("--format", self.format, FORMATS)):
            if value not in known:
                raise OptionError(f"{option} is {value!r}: use {', '.join(known)}")
        if not 0 <= self.damping <= 1e4:
            raise OptionError(f"--damping is {self.damping}, but must be between 0 and 10000; 0.01 is usual")

    def rule(self) -> Rule:
        """The low rank as a recipe's rule."""
        return Rule(
            curvature=self.curvature,
            constraint=ConstraintOptions(low_rank=LowRankOptions(rank=self.rank)),
            solver=SolverOptions(name="whitened_svd", damping=self.damping),
        )


def repair_checkpoint(
    dense: Path,
    compressed: Path,
    out: Path,
    request: RepairRequest,
    calibration: Calibration,
    *,
    device: torch.device,
    overwrite: bool,
    progress: Progress,
    names: tuple[str, str],
    version: str,
) -> RepairReport:
    """Add to each layer of `compressed` the low rank nearest to what it lacks of the model `dense`, and write it.

    For a layer's error E = W - W_c the factors are min ‖G^½ (E - LR) A^½‖ in closed form: A is of the inputs that the
    layer has in the repaired model, all layers before it repaired, and G what the end loss feels of its outputs, with
    the curvature "kronecker". EoRA (Liu et al., 2024) has G = I, LoRC (Yao et al., 2023) A = I as well. In memory are
    one block, the samples' hidden states, and all factors. `names` are what a person calls the two models.

    Raises:
        HesseError: the models do not belong together, or something is wrong with the data, the options or the output;
            nothing is left at `out`.
    """
    clock = Clock()
    for model in (dense, compressed):
        check_output(out, model, overwrite, CONFIG if request.format == "adapter" else "config.json")
    with clock.phase("read"):
        pair = Pair.opened(dense, compressed, request.rank, request.ignore, device)
        if request.format == "adapter":
            check_adaptable(layer.name for layer in pair.layers)
        probed = probe_tokens(_needs(pair.layers, request), pair.layers, 0)
        selected = select_samples(dense, calibration, pair.network, probed)
    needed = pair.source.file_bytes * (1 if request.format == "adapter" else 3)
    with temporary_folder(out, needed) as folder:
        with TemporaryDirectory(dir=folder) as waiting:
            run = _Repair(pair, request, selected, calibration, folder, Path(waiting), clock, progress)
            report = run.run(names, out, version)
        write_text(folder / REPORT_FILE, json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _needs(layers: Iterable[Layer], request: RepairRequest) -> dict[str, tuple[str, ...]]:
    """Return the statistics of the layers: the Gram of their inputs, and the output factor or its diagonal."""
    needed = ("inputs", "output factor" if request.curvature == "kronecker" else "output diagonal")
    return {layer.name: needed for layer in layers}


@dataclass(eq=False)
class _Repair:
    """The state of one run."""

    pair: Pair
    request: RepairRequest
    selected: Selection
    calibration: Calibration
    folder: Path  # to write into
    waiting: Path  # for files that are needed meanwhile
    clock: Clock
    progress: Progress
    factors: dict[str, LowRankCode] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    layers: list[RepairedLayer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = Parts(self.waiting)

    def run(self, names: tuple[str, str], out: Path, version: str) -> RepairReport:
        """Do it all; everything is written into the folder."""
        pair, request = self.pair, self.request
        flows = self._dense_flows()
        self._walk(self._output_factors())
        if not self.factors:
            raise OptionError(f"{names[1]} lacks nothing of {names[0]} in the layers to be repaired: leave it as it is")
        with self.clock.phase("write"):
            written = self._written(names[1])
        with self.clock.phase("verify"):
            before = read_back(pair.network.checkpoint, pair.dense, flows, {}, self.progress)
            after = read_back(written, pair.dense, flows, self.digests, self.progress)
        measured = before.difference, after.difference
        predicted = [sum(getattr(x, f"predicted_{when}") or 0.0 for x in self.layers) for when in ("before", "after")]
        if measured[1] > measured[0]:
            if predicted[1] < predicted[0] / 2:
                raise VerificationError(
                    f"the repaired model is {measured[1]:.4g} nats per token from the dense one, and the compressed "
                    f"one {measured[0]:.4g}: nothing was put in place; give more samples, or another --curvature"
                )
            self.notes.append("the repair did not bring the model nearer to the dense one on the samples measured on")
        return RepairReport(
            dense=names[0],
            compressed=names[1],
            out=str(out),
            format=request.format,
            curvature=request.curvature,
            rank=request.rank,
            bytes_compressed=pair.network.checkpoint.file_bytes,
            bytes_added=written.file_bytes - pair.network.checkpoint.file_bytes,
            loss_name=before.difference_name("repaired"),
            predicted_before=predicted[0],
            predicted_after=predicted[1],
            measured_before=measured[0],
            measured_after=measured[1],
            standard_error_before=before.kl_standard_error,
            standard_error_after=after.kl_standard_error,
            samples=after.samples,
            held_out=self.selected.held_out,
            fallbacks=[*self.selected.notes, *self.notes],
            layers=self.layers,
            seconds={"total": self.clock.total, **self.clock.seconds},
            versions=versions(version),
        )

    def _dense_flows(self) -> list[StreamBatch]:
        """Where the check samples end in the dense model."""
        network, check = self.pair.dense, self.selected.check
        self.progress.begin("dense model", len(network.blocks))
        batches = check.batches(evaluation_batch(network, check.longest))
        return check_pass(network, batches, self.clock, self.progress.advance)

    def _output_factors(self) -> Known:
        """Collect the dense layers' output factors, by the layers' names in the compressed model."""
        network = self.pair.probed
        self.progress.begin("probe the loss", 2 * len(network.blocks) + 1)
        seed, step = self.calibration.seed, self.progress.advance
        needs = _needs(network.layers, self.request)
        known = probe(network, self.selected.probes, needs, self.waiting, seed, self.clock, step)
        return {name: known[twin] for name, twin in self.pair.twins.items() if twin in known}

    def _walk(self, known: Known) -> None:
        """Take the samples through the compressed model, and repair each layer where they arrive."""
        network, samples = self.pair.network, self.selected.samples
        self.progress.begin("repair", len(network.blocks))
        solver, needs = LayerSolver(), _needs(self.pair.layers, self.request)
        size = self.calibration.batch_size or calibration_batch(samples.longest)
        with self.clock.phase("calibrate"):
            batches = start(network, samples.batches(size))
        for block, layers in calibrated_blocks(network, batches, needs, known=known, clock=self.clock):
            for layer, statistics in layers:
                if layer.name in needs:
                    with self.clock.phase("solve"):
                        self._repair(layer, dict(statistics), solver)
            self._keep(block, {x.name: x.parameter for x in block.layers if x.name in self.factors})
            self.progress.advance()

    def _repair(self, layer: Layer, statistics: Mapping[str, Any], solver: LayerSolver) -> None:
        """Solve for one layer's factors, and put it with them in its place."""
        name, dense = layer.name, self.request.format == "dense"
        wanted, present = self.pair.weights(layer)
        lacking = wanted - present
        if not lacking.any():
            return
        constraint = LowRank(self.request.rank, dtype=torch.float32 if dense else self.pair.dtype(name))
        problem = LayerProblem(name, lacking, statistics, self.request.rule(), constraint)
        solved, gram = solver.solve(problem), problem.gram
        self.notes += solved.notes
        # As a reader multiplies them: on the CPU, since another device rounds its sums otherwise.
        code: LowRankCode = solved.solution.encoded
        left, right = (factor.cpu().contiguous() for factor in (code.left, code.right))
        stored = present.cpu() + left @ right
        repaired = (stored.to(self.pair.dtype(name)).float() if dense else stored).to(wanted)
        layer.replace(repaired)
        self.factors[name], self.digests[name] = LowRankCode(left, right), digest(repaired)
        whole = 2 * gram.quadratic(wanted)  # E‖W x‖²
        factor = output_factor(statistics) if gram.tokens else None
        before, after = effect(lacking, gram, factor), effect(repaired - wanted, gram, factor)
        self.layers.append(
            RepairedLayer(
                name=name,
                shape=(wanted.shape[0], wanted.shape[1]),
                method=solved.method,
                tokens=gram.tokens,
                damping=solved.damping,
                predicted_before=before.loss_increase,
                predicted_after=after.loss_increase,
                output_error_before=before.squared_error / whole if whole > 0 else None,
                output_error_after=after.squared_error / whole if whole > 0 else None,
            )
        )

    def _keep(self, block: Block, repaired: dict[str, Tensor]) -> None:
        """Write a block's tensors, for a dense result: those of `repaired` layers, and the others decoded."""
        if self.request.format == "adapter":
            return
        self.parts.add(self._decoded(self.pair.network.stored_in(block), repaired))

    def _decoded(self, names: Iterable[str], repaired: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The dense tensors `names` of the compressed checkpoint, those of `repaired` layers as they are now."""
        tensors = self.pair.network.checkpoint.read(names)
        for name, tensor in tensors.items():
            layer = name.removesuffix(".weight")
            if layer in self.pair.twins:
                tensors[name] = (repaired or {}).get(layer, tensor).to(self.pair.dtype(layer))
        return tensors

    def _written(self, name: str) -> Checkpoint:
        """Write the adapter, or what is left of a dense checkpoint; what came of it, read back."""
        network = self.pair.network
        if self.request.format == "adapter":
            write_adapter(self.folder, network, self.factors, self.pair.dtype, self.request.rank, name)
            return AdaptedCheckpoint(network.checkpoint.folder, self.folder, layer_paths(network))
        self.parts.add_left(network.checkpoint.names(), self._decoded)
        self.parts.assemble(self.folder)
        self.notes += copy_companions(network.checkpoint.folder, self.folder)
        config = {key: value for key, value in network.checkpoint.config.items() if key != "quantization_config"}
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        return open_checkpoint(self.folder)
