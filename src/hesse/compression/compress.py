"""The main job: a model from disk, solved a block at a time, to disk again."""

import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import compressed_tensors
import torch
import transformers
from torch import Tensor

from hesse.compression.budget import BudgetPlan
from hesse.compression.dense import DensePass, check_pass, probe
from hesse.compression.inputs import InputGrams
from hesse.compression.layers import LayerProblem, LayerSolver, digest, predicted_increase, relative_error
from hesse.compression.measure import measure
from hesse.compression.output import check_output, copy_companions, temporary_folder
from hesse.compression.plan import Plan, make_plan, whole_factors
from hesse.compression.report import CompressionReport, LayerReport, Verification
from hesse.compression.tokens import Calibration
from hesse.compression.verify import verify
from hesse.constraints import LowRank
from hesse.curvature import Gram
from hesse.estimation import GramAccumulator, Statistics
from hesse.evaluation.evaluate import evaluation_batch, vocabulary
from hesse.formats import open_checkpoint
from hesse.methods.recipe import Recipe
from hesse.models.network import Block, Layer
from hesse.models.stream import Flow, advance_with_stops, calibration_batch, start
from hesse.models.writer import SHARD_BYTES, ShardWriter, write_text
from hesse.progress import Clock, Progress, peak_memory

REPORT_FILE = "compression.json"
RECIPE_FILE = "recipe.yaml"


def compress_checkpoint(
    model: Path,
    out: Path,
    recipe: Recipe,
    calibration: Calibration,
    statistics: Path | None = None,
    *,
    target: str | None = None,
    planned: BudgetPlan | None = None,
    format: str,
    device: torch.device,
    overwrite: bool,
    measured: bool,
    progress: Progress,
    name: str,
    version: str,
) -> CompressionReport:
    """Compress the model folder `model`, which a person calls `name`, into a new folder `out`.

    Where `measured`, the result is measured layer by layer, along the change and in words too, for a report.
    A `target` refuses what that loader does not serve; `planned` is where the recipe comes from, for the report.
    With the folder `statistics` of `estimate_checkpoint`, curvature is read from there and no sample is calibrated on:
    each layer is then solved for the inputs that the dense model gives it.

    Raises:
        HesseError: something is wrong with the model, the data, the options or the output; nothing is left at `out`.
    """
    clock = Clock()
    check_output(out, model, overwrite)
    with clock.phase("read"):
        estimated = None if statistics is None else Statistics(statistics)
        plan = make_plan(model, recipe, calibration, estimated, format, device, target)
    size = plan.checkpoint.file_bytes
    expected_bytes = int(size * 1.05) + (1 << 20) + min(size, SHARD_BYTES)  # never less than the output will take
    with temporary_folder(out, expected_bytes) as folder:
        return _Run(plan, planned, clock, progress, measured).run(folder, out, name, version)


class _Run:
    """The state of one run: its plan, and what each layer came to."""

    def __init__(
        self, plan: Plan, planned: BudgetPlan | None, clock: Clock, progress: Progress, measured: bool
    ) -> None:
        self.plan, self.planned, self.clock, self.progress, self.measured = plan, planned, clock, progress, measured
        self.layers: list[LayerReport] = []
        self.notes = [*([] if planned is None else planned.notes), *plan.notes]
        if planned is not None:
            clock.seconds["plan"] = planned.seconds
        self.digests: dict[str, str] = {}
        self.solver = LayerSolver()

    def run(self, folder: Path, out: Path, model_name: str, version: str) -> CompressionReport:
        """Do it all; everything is written into `folder`."""
        plan = self.plan
        length = max(len(ids) for ids in plan.samples.ids)
        with tempfile.TemporaryDirectory(prefix=".factors-", dir=folder) as factors:
            dense = self._dense_pass(length, Path(factors))
            self._compress(folder, length, dense)
        with self.clock.phase("verify"):
            predicted = {layer.name: layer.predicted_loss_increase or 0.0 for layer in self.layers}
            verification = verify(
                folder, plan.checkpoint, plan.dense, dense, self.digests, predicted, plan.held_out, self.progress
            )
        report = self._report(folder, out, model_name, version, length, verification)
        if self.measured:
            with self.clock.phase("measure"):
                costs = {layer.name: layer.predicted_loss_increase for layer in self.layers}
                result = open_checkpoint(folder)
                measurements = measure(plan.dense, result, plan.check, plan.seen, costs, self.progress)
            seconds = self._seconds()
            report = replace(report, measurements=measurements, seconds=seconds, peak_rss_bytes=peak_memory())
        write_text(folder / RECIPE_FILE, plan.recipe.to_yaml())
        write_text(folder / REPORT_FILE, json.dumps(report.to_dict(), indent=2) + "\n")
        return report

    def _compress(self, folder: Path, length: int, dense: DensePass) -> None:
        """Take the calibration samples through the blocks, and write each once it is solved."""
        plan, blocks = self.plan, self.plan.network.blocks
        self.progress.begin("compress", len(blocks))
        flows: list[Flow] = []
        if plan.statistics is None:
            with self.clock.phase("calibrate"):
                batch_size = plan.calibration.batch_size or calibration_batch(length)
                flows = start(plan.network, plan.samples.batches(batch_size))
        writer = ShardWriter(folder)
        written: set[str] = set()
        for index, block in enumerate(blocks):
            self._block(index, block, flows, dense, writer, written)
            self.progress.advance()
        with self.clock.phase("write"):
            for name in plan.checkpoint.stored_names():
                if name not in written:
                    writer.add(plan.checkpoint.read_stored([name]))
            writer.close()
            self._write_companions(folder)

    def _dense_pass(self, length: int, folder: Path) -> DensePass:
        """What the loss feels of each layer's outputs, and where the check samples end in the unchanged model."""
        plan, seed, step = self.plan, self.plan.calibration.seed, self.progress.advance
        walks = 1 if plan.statistics is not None else 3
        self.progress.begin("probe the loss", walks * len(plan.network.blocks) + (walks > 1))
        batch_size = evaluation_batch(vocabulary(plan.dense), length)
        flows = check_pass(plan.dense, plan.check.batches(batch_size), self.clock, step)
        if plan.statistics is not None:
            return DensePass(plan.statistics.sensitivities, flows)
        return DensePass(
            probe(plan.network, plan.probes, whole_factors(plan.rules), folder, seed, self.clock, step), flows
        )

    def _seconds(self) -> dict[str, float]:
        """In all, and by phase; a budget was planned before this run's clock began."""
        return {"total": self.clock.total + self.clock.seconds.get("plan", 0.0), **self.clock.seconds}

    def _report(
        self, folder: Path, out: Path, model_name: str, version: str, length: int, verification: Verification
    ) -> CompressionReport:
        """The account of a run whose files are in `folder` and will be at `out`."""
        plan, after = self.plan, open_checkpoint(folder)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        bits = sum(layer.shape[0] * layer.shape[1] * layer.bits_per_weight for layer in self.layers)
        return CompressionReport(
            method=plan.recipe.method,
            model=model_name,
            out=str(out),
            format=plan.format.name,
            seconds=self._seconds(),
            peak_rss_bytes=peak_memory(),
            bytes_before=plan.checkpoint.file_bytes,
            bytes_after=after.file_bytes,
            bits_per_weight=bits / weights,
            bits_per_weight_model=8 * after.stored_bytes / sum(p.numel() for p in plan.dense.model.parameters()),
            predicted_loss_increase=verification.predicted,
            verification=verification,
            calibration={
                "source": plan.samples.source,
                "curvature": None if plan.statistics is None else str(plan.statistics.folder),
                "samples": len(plan.samples.ids),
                "length": length,
                "tokens": sum(len(ids) for ids in plan.samples.ids),
                "seed": plan.calibration.seed,
                "fingerprint": plan.samples.fingerprint(),
            },
            fallbacks=self.notes,
            layers=self.layers,
            recipe=plan.recipe.model_dump(mode="json", exclude_none=True),
            versions={
                "hesse": version,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "compressed_tensors": compressed_tensors.__version__,
                "python": platform.python_version(),
            },
            front=None if self.planned is None else self.planned.front,
        )

    def _block(
        self, index: int, block: Block, flows: list[Flow], dense: DensePass, writer: ShardWriter, written: set[str]
    ) -> None:
        """Solve the layers of one block, and write its tensors."""
        tensors: dict[str, Tensor] = {}
        with self.clock.phase("read"), self.plan.network.loaded(block):
            if self.plan.statistics is None:
                missed = self._on_the_way(index, block, flows, dense, tensors)
            else:
                missed = self._from_statistics(block, self.plan.statistics, dense, tensors)
            for layer in missed:
                if self.plan.rules.get(layer.name) is not None:
                    empty = GramAccumulator(layer.name, layer.weight.shape[1], self.plan.network.device).gram()
                    tensors.update(self._solve(layer, empty, dense))
        with self.clock.phase("write"):
            solved = {layer.name for layer in block.layers if self.plan.rules.get(layer.name) is not None}
            for name in self._stored_names(block):
                layer_name, _, kind = name.rpartition(".")
                if layer_name not in solved or kind not in ("weight", "bias"):
                    tensors.update(self.plan.checkpoint.read_stored([name]))
                written.add(name)
            writer.add(tensors)

    def _on_the_way(
        self, index: int, block: Block, flows: list[Flow], dense: DensePass, tensors: dict[str, Tensor]
    ) -> list[Layer]:
        """Solve layers on what all that is compressed before them now gives; the layers that no sample reached."""
        grams = InputGrams(self.clock)

        def change(layer: Layer) -> None:
            gram = grams.gram()  # of an ignored layer too: it ends what was collected
            if self.plan.rules.get(layer.name) is not None:
                tensors.update(self._solve(layer, gram, dense))

        with self.clock.phase("calibrate"):
            return advance_with_stops(flows, block, index, grams.collect, change)

    def _from_statistics(
        self, block: Block, statistics: Statistics, dense: DensePass, tensors: dict[str, Tensor]
    ) -> list[Layer]:
        """Solve layers on what the dense model gave; the layers that no sample reached then."""
        missed = []
        for layer in block.layers:
            if self.plan.rules.get(layer.name) is None:
                continue
            with self.clock.phase("estimate"):
                gram = statistics.gram(layer.name, self.plan.network.device)
            if gram is None:
                missed.append(layer)
            else:
                tensors.update(self._solve(layer, gram, dense))
        return missed

    def _solve(self, layer: Layer, gram: Gram, dense: DensePass) -> dict[str, Tensor]:
        """Solve one layer, put the result in its place, and return the tensors to write for it."""
        rule, constraint = self.plan.rules[layer.name], self.plan.format.constraint(layer.name)
        assert rule is not None and constraint is not None
        with self.clock.phase("solve"):
            weight, sensitivity = layer.weight.float(), self._output_factor(layer.name, dense)
            solved = self.solver.solve(LayerProblem(layer.name, weight, gram, sensitivity, rule, constraint))
            encoded = solved.solution.encoded
            stored = self.plan.format.as_stored(layer.name, encoded, solved.solution.weight)
            layer.replace(stored)
        self.notes += solved.notes
        with self.clock.phase("predict"):
            if sensitivity is None and gram.tokens:
                self.notes.append(f"{layer.name}: no prediction: the tokens that probed the loss did not reach it")
            change = stored - weight
            self.layers.append(
                LayerReport(
                    name=layer.name,
                    shape=(weight.shape[0], weight.shape[1]),
                    method=solved.method,
                    tokens=gram.tokens,
                    damping=solved.damping,
                    bits_per_weight=self.plan.format.stored_bits(layer.name),
                    sparsity=float((stored == 0).float().mean()),
                    rank=min(constraint.rank, *weight.shape) if isinstance(constraint, LowRank) else None,
                    predicted_loss_increase=predicted_increase(change, gram, sensitivity),
                    relative_output_error=relative_error(change, weight, gram),
                )
            )
        with self.clock.phase("write"):
            self.digests[layer.name] = digest(stored)
            bias_name = f"{layer.name}.bias"
            stored_bias = [bias_name] if bias_name in self.plan.checkpoint.shard_of else []
            bias = self.plan.checkpoint.read_stored(stored_bias).get(bias_name)
            return self.plan.format.tensors(layer.name, encoded, stored, bias)

    def _output_factor(self, layer: str, dense: DensePass) -> Tensor | None:
        """What the loss feels of a layer's outputs: all of G (out, out) where it was estimated before, else E[g²]."""
        if self.plan.statistics is not None:
            kronecker = self.plan.statistics.kronecker(layer, self.plan.network.device)
            if kronecker is not None:
                return kronecker.output_factor
        return dense.sensitivities.get(layer)

    def _stored_names(self, block: Block) -> list[str]:
        """The checkpoint's names of the tensors of a block."""
        sources = self.plan.network.sources
        return list(dict.fromkeys(sources[n] for n in sources if n.startswith(f"{block.name}.")))

    def _write_companions(self, folder: Path) -> None:
        copy_companions(self.plan.model, folder)
        write_text(folder / "config.json", json.dumps(self.plan.format.config(), indent=2) + "\n")
        for name, text in self.plan.format.files().items():
            write_text(folder / name, text)
