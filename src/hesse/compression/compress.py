"""The main job: a model from disk, solved a block at a time, to disk again."""

import json
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import compressed_tensors
import torch
import transformers
from torch import Tensor

from hesse.compression.dense import DensePass, dense_pass
from hesse.compression.layers import LayerSolver, digest, predicted_increase, relative_error
from hesse.compression.output import check_output, copy_companions, temporary_folder
from hesse.compression.report import CompressionReport, LayerReport
from hesse.compression.verify import verify
from hesse.curvature import Gram
from hesse.data import Samples, read_samples
from hesse.errors import CheckpointError, HesseError, OptionError
from hesse.estimation import GramAccumulator
from hesse.evaluation.evaluate import check_ids, evaluation_batch, vocabulary
from hesse.formats import Format, StoredLayer, choose_format, open_checkpoint
from hesse.methods.recipe import Recipe, Rule, matches
from hesse.models.checkpoint import Checkpoint
from hesse.models.network import Block, Layer, Network
from hesse.models.stream import Flow, advance_with_stops, start
from hesse.models.writer import ShardWriter, write_text
from hesse.progress import Clock, Progress

REPORT_FILE = "compression.json"
BATCH_TOKENS = 2048  # few enough to stay in the caches of a CPU, enough to keep its products large
DEFAULT_LENGTH = 2048
PROBE_TOKENS = 1024  # for the sensitivities, and again for the check; at least two samples each


@dataclass(frozen=True)
class Calibration:
    """Which tokens a run looks at, and in what portions."""

    data: str | Path | list[list[int]] | None
    samples: int
    length: int | None  # None: as many as the model has positions for, at most DEFAULT_LENGTH
    seed: int
    batch_size: int | None


def compress_checkpoint(
    model: Path,
    out: Path,
    recipe: Recipe,
    calibration: Calibration,
    *,
    format: str,
    device: torch.device,
    overwrite: bool,
    progress: Progress,
    name: str,
    version: str,
) -> CompressionReport:
    """Compress the model folder `model`, which a person calls `name`, into a new folder `out`.

    Raises:
        HesseError: something is wrong with the model, the data, the options or the output; nothing is left at `out`.
    """
    clock = Clock()
    check_output(out, model, overwrite)
    with clock.phase("read"):
        run = _Run(model, recipe, calibration, format, device, clock, progress)
    with temporary_folder(out, run.expected_bytes()) as folder:
        report = run.run(folder, out, name, version)
    return report


class _Run:
    """The state of one run: what was planned, and what each layer came to."""

    def __init__(
        self,
        model: Path,
        recipe: Recipe,
        calibration: Calibration,
        format_name: str,
        device: torch.device,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.recipe, self.calibration, self.clock, self.progress = recipe, calibration, clock, progress
        self.model = model
        self.checkpoint = open_checkpoint(model)
        if type(self.checkpoint) is not Checkpoint:
            raise CheckpointError(f"{model} is compressed already: start from the dense model it was made from")
        self.dense = Network(self.checkpoint, torch.float32, device)
        self.network = self.dense.in_dtype(_compute_dtype(self.checkpoint, self.dense, device))
        self.rules = _rules(self.network, recipe)
        self.format = _format(format_name, self.network, self.rules)
        self.samples, reserved = _samples(model, calibration, self.network)
        probes = self.samples.ids[: _probe_count(len(self.samples.ids[0]))]
        self.probes = Samples(probes, self.samples.source, self.samples.exact)
        if all(rule is None or rule.curvature == "identity" for rule in self.rules.values()):
            self.samples = self.probes  # only the prediction looks at them
        self.held_out = bool(reserved.ids)
        self.check = reserved if self.held_out else self.probes
        check_ids(self.network, self.samples.batches(1))
        self.layers: list[LayerReport] = []
        self.notes: list[str] = list(self.format.notes)
        asked, length = calibration.length, sample_length(self.network, calibration.length)
        if asked is not None and asked > length and not self.samples.exact:
            self.notes.append(f"samples have {length} tokens, not {asked}: the model has positions for no more")
        self.digests: dict[str, str] = {}
        self.solver = LayerSolver()

    def expected_bytes(self) -> int:
        """Roughly what the output takes: never less than it will."""
        return int(self.checkpoint.file_bytes * 1.05) + (1 << 20)

    def run(self, folder: Path, out: Path, model_name: str, version: str) -> CompressionReport:
        """Do it all; everything is written into `folder`."""
        blocks = len(self.network.blocks)
        self.progress.begin("probe the loss", 2 * blocks + 1)
        length = max(len(ids) for ids in self.samples.ids)
        size = evaluation_batch(vocabulary(self.dense), length)
        check = self.check.batches(size)
        dense = dense_pass(
            self.dense,
            check,
            self.probes.batches(size) if self.held_out else check,
            self.calibration.seed,
            self.clock,
            self.progress.advance,
        )
        self.progress.begin("compress", blocks)
        with self.clock.phase("calibrate"):
            flows = start(self.network, self.samples.batches(self._batch_size(length)))
        writer = ShardWriter(folder)
        written: set[str] = set()
        for index, block in enumerate(self.network.blocks):
            self._block(index, block, flows, dense, writer, written)
            self.progress.advance()
        with self.clock.phase("write"):
            for name in self.checkpoint.stored_names():
                if name not in written:
                    writer.add(self.checkpoint.read_stored([name]))
            writer.close()
            self._write_companions(folder)
        with self.clock.phase("verify"):
            predicted = {layer.name: layer.predicted_loss_increase or 0.0 for layer in self.layers}
            verification = verify(
                folder, self.checkpoint, self.dense, dense, self.digests, predicted, self.held_out, self.progress
            )
        after = open_checkpoint(folder)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        bits = sum(layer.shape[0] * layer.shape[1] * layer.bits_per_weight for layer in self.layers)
        report = CompressionReport(
            method=self.recipe.method,
            model=model_name,
            out=str(out),
            format=self.format.name,
            seconds={"total": self.clock.total, **self.clock.seconds},
            peak_rss_bytes=peak_memory(),
            bytes_before=self.checkpoint.file_bytes,
            bytes_after=after.file_bytes,
            bits_per_weight=bits / weights,
            bits_per_weight_model=8 * after.stored_bytes / sum(p.numel() for p in self.dense.model.parameters()),
            predicted_loss_increase=verification.predicted,
            verification=verification,
            calibration={
                "source": self.samples.source,
                "samples": len(self.samples.ids),
                "length": length,
                "tokens": sum(len(ids) for ids in self.samples.ids),
                "seed": self.calibration.seed,
                "fingerprint": self.samples.fingerprint(),
            },
            fallbacks=self.notes,
            layers=self.layers,
            recipe=self.recipe.model_dump(mode="json", exclude_none=True),
            versions={
                "hesse": version,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "compressed_tensors": compressed_tensors.__version__,
                "python": platform.python_version(),
            },
        )
        write_text(folder / REPORT_FILE, json.dumps(report.to_dict(), indent=2) + "\n")
        return report

    def _batch_size(self, length: int) -> int:
        return self.calibration.batch_size or max(BATCH_TOKENS // length, 1)

    def _block(
        self, index: int, block: Block, flows: list[Flow], dense: DensePass, writer: ShardWriter, written: set[str]
    ) -> None:
        """Solve the layers of one block on what the blocks before it now give, and write its tensors."""
        tensors: dict[str, Tensor] = {}
        accumulator: GramAccumulator | None = None
        gram: Gram | None = None  # of the inputs of the layers that are changed now; None while inputs are collected

        def collect(layer: Layer, inputs: Tensor) -> None:
            nonlocal accumulator, gram
            with self.clock.phase("estimate"):
                if accumulator is None or gram is not None:
                    accumulator, gram = GramAccumulator(layer.name, inputs.shape[-1], inputs.device), None
                accumulator.add(inputs)

        def change(layer: Layer) -> None:
            nonlocal gram
            assert accumulator is not None
            if gram is None:
                with self.clock.phase("estimate"):
                    gram = accumulator.gram()
            if self.rules.get(layer.name) is None:
                return
            with self.clock.phase("solve"):
                tensors.update(self._solve(layer, gram, dense))

        with self.clock.phase("read"), self.network.loaded(block), self.clock.phase("calibrate"):
            missed = advance_with_stops(flows, block, index, collect, change)
            for layer in missed:
                if self.rules.get(layer.name) is not None:
                    empty = GramAccumulator(layer.name, layer.weight.shape[1], self.network.device).gram()
                    tensors.update(self._solve(layer, empty, dense))
        with self.clock.phase("write"):
            solved = {layer.name for layer in block.layers if self.rules.get(layer.name) is not None}
            for name in self._stored_names(block):
                layer_name, _, kind = name.rpartition(".")
                if layer_name not in solved or kind not in ("weight", "bias"):
                    tensors.update(self.checkpoint.read_stored([name]))
                written.add(name)
            writer.add(tensors)

    def _solve(self, layer: Layer, gram: Gram, dense: DensePass) -> dict[str, Tensor]:
        """Solve one layer, put the result in its place, and return the tensors to write for it."""
        rule, constraint = self.rules[layer.name], self.format.constraint(layer.name)
        assert rule is not None and constraint is not None
        weight = layer.weight.float()
        solved = self.solver.solve(layer.name, weight, gram, rule, constraint)
        solution = solved.solution
        stored = self.format.as_stored(layer.name, solution.encoded, solution.weight)
        layer.replace(stored)
        self.digests[layer.name] = digest(stored)
        change = stored - weight
        sensitivity = dense.sensitivities.get(layer.name)
        if sensitivity is None and gram.tokens:
            solved.notes.append(f"{layer.name}: no prediction, since the tokens that probed the loss did not reach it")
        self.notes += solved.notes
        self.layers.append(
            LayerReport(
                name=layer.name,
                shape=(weight.shape[0], weight.shape[1]),
                method=solved.method,
                tokens=gram.tokens,
                damping=solved.damping,
                bits_per_weight=self.format.stored_bits(layer.name),
                predicted_loss_increase=predicted_increase(change, gram, sensitivity),
                relative_output_error=relative_error(change, weight, gram),
            )
        )
        bias_name = f"{layer.name}.bias"
        bias = (
            self.checkpoint.read_stored([bias_name]).get(bias_name) if bias_name in self.checkpoint.shard_of else None
        )
        return self.format.tensors(layer.name, solution.encoded, stored, bias)

    def _stored_names(self, block: Block) -> list[str]:
        """The checkpoint's names of the tensors of a block."""
        sources = self.network.sources
        return list(dict.fromkeys(sources[n] for n in sources if n.startswith(f"{block.name}.")))

    def _write_companions(self, folder: Path) -> None:
        copy_companions(self.model, folder)
        write_text(folder / "config.json", json.dumps(self.format.config(), indent=2) + "\n")
        for name, text in self.format.files().items():
            write_text(folder / name, text)


def _compute_dtype(checkpoint: Checkpoint, network: Network, device: torch.device) -> torch.dtype:
    """The type that calibration runs in: the weights' own where the device multiplies it at speed, else float32."""
    stored = checkpoint.dtype(f"{network.layers[0].name}.weight")
    if device.type == "cuda":
        return stored
    native = torch.cpu.get_capabilities()
    fast = stored == torch.bfloat16 and any(native.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def peak_memory() -> int:
    """The most memory that this process has had at once, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # resource's figure starts from that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _rules(network: Network, recipe: Recipe) -> dict[str, Rule | None]:
    """The rule of each linear layer of the blocks; None for those left as they are.

    Raises:
        OptionError: a pattern matches nothing, or nothing is left to compress.
    """
    names = [layer.name for layer in network.layers]
    known = [*names, *(name for name, _ in network.model.named_modules())]
    for pattern in (*recipe.ignore, *(p for rule in recipe.rules for p in rule.layers)):
        if not any(matches(name, pattern) for name in known):
            raise OptionError(f"the pattern {pattern!r} matches no layer of this model; a layer's name is {names[0]}")
    rules = {name: recipe.rule_for(name) for name in names}
    if not any(rules.values()):
        raise OptionError("no layer is left to compress: leave out an --ignore, or widen the recipe's patterns")
    return rules


def _format(name: str, network: Network, rules: dict[str, Rule | None]) -> Format:
    """The format, once every layer's constraint has been seen to fit its shape."""
    stored = []
    for layer in network.layers:
        rule, shape = rules[layer.name], layer.weight.shape
        constraint = None if rule is None else rule.constraint.build()
        if constraint is not None:
            try:
                constraint.check(shape)
            except HesseError as error:
                raise type(error)(f"{layer.name}: {error}") from None
        stored.append(StoredLayer(layer.name, shape, constraint, layer.transposed))
    return choose_format(name, network, stored)


def _samples(model: Path, calibration: Calibration, network: Network) -> tuple[Samples, Samples]:
    """Samples to calibrate on, and others to check the result with (none where the data gives ready tokens)."""
    length = sample_length(network, calibration.length)
    return read_samples(
        calibration.data,
        model,
        count=calibration.samples,
        length=length,
        seed=calibration.seed,
        purpose="calibration",
        limit=network.input_limit,
        reserve=_probe_count(length),
    )


def _probe_count(length: int) -> int:
    return max(PROBE_TOKENS // length, 2)


def sample_length(network: Network, asked: int | None) -> int:
    """Tokens a sample: as asked, but no more than the model has positions for."""
    wanted = DEFAULT_LENGTH if asked is None else asked
    return wanted if network.input_limit is None else min(wanted, network.input_limit)
