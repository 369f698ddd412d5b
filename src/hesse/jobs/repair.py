"""`hesse repair`: add the best low rank to each layer of a compressed checkpoint from any program."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.constraints import LowRankCode
from hesse.data.selection import Calibration, Data
from hesse.errors import OptionError, VerificationError
from hesse.estimation.calibrated import Layers, LayerStatistics
from hesse.estimation.probe import check_pass
from hesse.estimation.statistics import probe_tokens
from hesse.formats import open_checkpoint
from hesse.formats.adapter import CONFIG, AdaptedCheckpoint, check_adaptable, layer_paths, write_adapter
from hesse.jobs.forecast import Work, hidden_bytes, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import calibration_phases, comparison_phases, gradient_phases
from hesse.jobs.options import run_options
from hesse.jobs.recorded_blocks import BlockRecord
from hesse.jobs.repair_layer import LayerRepairs, RepairedWeight, RepairRequest
from hesse.jobs.repair_pair import Pair
from hesse.jobs.repair_report import RepairedLayer, RepairReport
from hesse.jobs.task import Task, run_task
from hesse.jobs.verify import read_back
from hesse.networks.network import Block, CheckpointNetwork, Layer
from hesse.passes.stream import StreamBatch, calibration_batch, evaluation_batch
from hesse.progress import Progress
from hesse.result import ForecastReport, Result

LEFT, RIGHT = ".left", ".right"  # suffixes of a layer's name: the factors that a run for an adapter keeps


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
    bos: bool | None = None,
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
        bos: start windows of text with BOS, or not; None for what the tokenizer does.
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
    calibration = Calibration(data, samples, length, seed, batch_size, bos)
    run = run_options(device, None, overwrite, restart, dry_run, progress)
    mark = CONFIG if format == "adapter" else "config.json"
    options = {"options": repr(request)}
    return run_task(
        "repair",
        [dense, compressed],
        Path(out),
        calibration,
        run,
        options,
        lambda job: _Repair(job, request, str(compressed)),
        mark,
    )


class _Repair(Task[RepairReport]):
    """Repair: the dense model's pass, repairing each layer as the samples reach it, and the measurement."""

    def __init__(self, job: Job, request: RepairRequest, compressed: str) -> None:
        self.request, self.compressed = request, compressed  # as the user named it
        dense, other = job.sources
        self.pair = pair = Pair.open(dense, other, request.rank, request.ignore, job.run.device)
        if request.format == "adapter":
            check_adaptable(layer.name for layer in pair.layers)
        super().__init__(job, pair.network, probe_tokens(self._needs(pair.layers), pair.layers, 0))
        self.needed_bytes = pair.source.file_bytes * (1 if request.format == "adapter" else 3)
        hidden = hidden_bytes(pair.network, tokens_of(self.selected.samples))
        self.needed_bytes += (len(pair.network.blocks) + 8) * hidden

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [self.pair.source, self.network.checkpoint]

    def _needs(self, layers: Iterable[Layer]) -> dict[str, tuple[str, ...]]:
        """Return the statistics of the layers: the Gram of their inputs, and the output factor or its diagonal."""
        needed = ("inputs", "output factor" if self.request.curvature == "kronecker" else "output diagonal")
        return {layer.name: needed for layer in layers}

    def work(self) -> Work:
        pair, samples, request, probes = self.pair, self.selected.samples, self.request, self.selected.probes
        batch, tokens, repairs = self.batch_size * samples.longest, tokens_of(samples), LayerRepairs(pair, request)
        whole, adapter = request.curvature == "kronecker", request.format == "adapter"
        repaired = {pair.twins[layer.name] for layer in pair.layers} if whole else set[str]()

        def factors(block: Block) -> int:
            return sum(4 * layer.weight.shape[0] ** 2 for layer in block.layers if layer.name in repaired)

        def solve(layer: Layer, statistics: LayerStatistics) -> object:
            factor = {"output factor": torch.eye(layer.weight.shape[0])} if whole else {}
            return repairs.of_layer(layer, {**statistics, **factor})

        probing = min(calibration_batch(samples.longest) * samples.longest, batch)
        workspace = {layer.name: repairs.workspace(layer, len(probes.ids)) for layer in pair.layers}
        compressed, dense = pair.network.checkpoint.file_bytes, pair.source.file_bytes
        added = sum(request.rank * sum(x.weight.shape) * pair.dtype(x.name).itemsize for x in pair.layers)
        return Work(
            after=compressed + added if adapter else dense,
            out=added if adapter else dense,
            disk=self.needed_bytes,
            phases={
                **comparison_phases(pair.dense, samples.longest),
                **gradient_phases(pair.probed, probing, factors),
                **calibration_phases("repair", pair.network, tokens, batch, workspace),
            },
            forward=3 * tokens_of(self.selected.check) + tokens_of(probes),
            calibrated=tokens,
            backward=tokens_of(probes),
            bytes=4 * (compressed + dense),
            layers={layer.name: layer.weight.shape for layer in pair.layers},
            solve=solve,
        )

    def run(self) -> RepairReport:
        pair, job = self.pair, self.job
        flows = self._dense_flows()
        known = self.probe(pair.probed, self._needs(pair.probed.layers))
        factors = {name: known[twin] for name, twin in pair.twins.items() if twin in known}
        repairs, needs = LayerRepairs(pair, self.request), self._needs(pair.layers)

        def solve(block: Block, layers: Layers, _: object) -> BlockRecord:
            return self._record(block, repairs.of_block(layers, job.clock))

        records = self.solve_blocks("repair", needs, solve, factors)
        layers = [RepairedLayer(**{**x, "shape": tuple(x["shape"])}) for record in records for x in record["layers"]]
        digests = {name: digest for record in records for name, digest in record["digests"].items()}
        job.notes += [note for record in records for note in record["notes"]]
        if not digests:
            raise OptionError(
                f"{self.compressed} lacks nothing of {job.name} in the layers to be repaired: leave it as it is"
            )
        with job.clock.phase("write"):
            result = self._write(digests)
        with job.clock.phase("verify"):
            before = CheckpointNetwork(pair.network.checkpoint, torch.float32, pair.dense.device)
            after = CheckpointNetwork(result, torch.float32, pair.dense.device)
            if self.request.format == "dense":
                job.check_loads(after, pair.source, flows[0].ids)
            evaluations = (
                read_back(before, pair.dense, flows, {}, job.progress),
                read_back(after, pair.dense, flows, digests, job.progress),
            )
        predicted = [sum(getattr(x, f"predicted_{when}") or 0.0 for x in layers) for when in ("before", "after")]
        losses = [
            evaluation.loss_change("repaired", self.selected.held_out, loss)
            for evaluation, loss in zip(evaluations, predicted, strict=True)
        ]
        self._check([evaluation.difference for evaluation in evaluations], predicted)
        size = pair.network.checkpoint.file_bytes
        return RepairReport(
            **job.head(size, result.file_bytes, losses[1]),
            method=self.request.curvature,
            compressed=self.compressed,
            format=self.request.format,
            rank=self.request.rank,
            bytes_added=result.file_bytes - size,
            loss_before=losses[0],
            layers=layers,
        )

    def _record(self, block: Block, repaired: list[RepairedWeight]) -> BlockRecord:
        """Return a block's record, with its dense tensors, or for an adapter the factors of its repaired layers."""
        content = {
            "layers": [asdict(weight.layer) for weight in repaired],
            "digests": {weight.layer.name: weight.digest for weight in repaired},
            "notes": [note for weight in repaired for note in weight.notes],
        }
        if self.request.format == "dense":
            weights = {weight.layer.name: weight.parameter for weight in repaired}
            return BlockRecord(content, self._dense_tensors(self.network.stored_in(block), weights))
        sides = ((LEFT, "left"), (RIGHT, "right"))
        return BlockRecord(
            content, {x.layer.name + end: getattr(x.factors, side) for x in repaired for end, side in sides}
        )

    def _dense_tensors(self, names: Iterable[str], repaired: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the tensors `names` of the compressed checkpoint decoded, with the weights of `repaired` layers."""
        tensors = self.pair.network.checkpoint.read(names)
        for name, tensor in tensors.items():
            layer = name.removesuffix(".weight")
            if layer in self.pair.twins:
                tensors[name] = (repaired or {}).get(layer, tensor).to(self.pair.dtype(layer))
        return tensors

    def _check(self, measured: list[float], predicted: list[float]) -> None:
        """Refuse a repair that made the model worse although it was predicted to help; note one that did not help."""
        if measured[1] <= measured[0]:
            return
        if predicted[1] < predicted[0] / 2:
            raise VerificationError(
                f"the repaired model is {measured[1]:.4g} nats per token from the dense one, and the compressed one "
                f"{measured[0]:.4g}: nothing was put in place; give more samples, or another --curvature"
            )
        self.job.notes.append("the repair did not bring the model nearer to the dense one on the samples measured on")

    def _dense_flows(self) -> list[StreamBatch]:
        """Return where the check samples end in the dense model."""
        network, check, job = self.pair.dense, self.selected.check, self.job
        job.progress.begin("dense model", len(network.blocks))
        batches = check.batches(evaluation_batch(network, check.longest))
        return check_pass(network, batches, job.clock, job.progress.advance, job.journal)

    def _write(self, repaired: Iterable[str]) -> Checkpoint:
        """Write the adapter of the `repaired` layers, or the rest of a dense checkpoint, and open the result."""
        network, job = self.network, self.job
        if self.request.format == "adapter":
            tensors = {name: tensor for part in job.parts for name, tensor in load_file(part.path).items()}
            factors = {name: LowRankCode(tensors[name + LEFT], tensors[name + RIGHT]) for name in repaired}
            write_adapter(job.folder, network, factors, self.pair.dtype, self.request.rank, self.compressed)
            return AdaptedCheckpoint(network.checkpoint.folder, job.folder, layer_paths(network))
        job.write_rest(network.checkpoint.names(), self._dense_tensors)
        config = {key: value for key, value in network.checkpoint.config.items() if key != "quantization_config"}
        job.notes += job.assemble(config)
        return open_checkpoint(job.folder)
