"""`hesse estimate`: a model's curvature to disk, a block at a time."""

import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.output import check_output, temporary_folder
from hesse.checkpoints.tensor_store import TensorStore
from hesse.checkpoints.writer import write_text
from hesse.curvature import Curvature, Diagonal, Gram, Kronecker
from hesse.data.selection import Calibration, Selection, sample_length, select_samples
from hesse.errors import OptionError
from hesse.estimation import Sums, save_curvature
from hesse.estimation.calibrated import calibrated_blocks
from hesse.estimation.probe import forward_walk, probe
from hesse.estimation.statistics import probe_tokens
from hesse.estimation.statistics_folder import INDEX_FILE, SENSITIVITIES_FILE
from hesse.formats.opening import open_networks
from hesse.networks.network import Network
from hesse.passes.backward import BackwardPass, layer_part
from hesse.passes.stream import calibration_batch, start
from hesse.progress import Clock, Progress

Kind = Literal["gram", "kronecker", "fisher"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def estimate_checkpoint(
    model: Path,
    out: Path,
    kinds: Sequence[str],
    calibration: Calibration,
    *,
    device: torch.device,
    overwrite: bool,
    progress: Progress,
    version: str,
) -> dict[str, Any]:
    """Estimate the curvatures `kinds` of the model folder `model`, uncompressed, into a new folder `out`.

    A "gram" is of the inputs that calibration in the weights' own type gives; "kronecker" and "fisher" come from a walk
    back through the blocks in float32. What reached each block waits on disk.

    Returns:
        The content of its index: what was estimated, from what, with what, and the seconds by phase.

    Raises:
        HesseError: something is wrong with the model, the data, the options or the output; nothing is left at `out`.
    """
    clock = Clock()
    for kind in kinds or [""]:
        if kind not in KINDS:
            raise OptionError(f"there is no curvature {kind!r} to estimate: use {', '.join(KINDS)}")
    check_output(out, model, overwrite, INDEX_FILE)
    if calibration.data is not None and not isinstance(calibration.data, str | Path):
        raise OptionError("statistics name their data, so that it can be read again: give a file, not token ids")
    with clock.phase("read"):
        checkpoint, dense, network = open_networks(model, device)
        factors = {layer.name: ("output factor",) for layer in network.layers}
        selected = select_samples(model, calibration, network, probe_tokens(factors, network.layers, 0))
    with temporary_folder(out, _expected_bytes(network, kinds)) as folder:
        run = _Estimation(folder, dense, network, selected, calibration, clock, progress)
        content = run.run([kind for kind in KINDS if kind in kinds])
        content = {**_identity(checkpoint, network, selected, calibration, version), **content}
        content["seconds"] = {"total": clock.total, **clock.seconds}
        write_text(folder / INDEX_FILE, json.dumps(content, indent=2) + "\n")
    return content


def _expected_bytes(network: Network, kinds: Sequence[str]) -> int:
    """What the files may take together."""
    shapes = [layer.weight.shape for layer in network.layers]
    each = {
        "gram": sum(columns**2 for _, columns in shapes),
        "kronecker": sum(rows**2 + columns**2 for rows, columns in shapes),
        "fisher": sum(rows * columns for rows, columns in shapes),
    }
    probed = 0 if "kronecker" in kinds else sum(rows**2 for rows, _ in shapes)
    return 4 * (probed + sum(each[kind] for kind in kinds))


def _identity(
    checkpoint: Checkpoint, network: Network, selected: Selection, calibration: Calibration, version: str
) -> dict[str, Any]:
    """What the statistics are of, so that others are noticed."""
    asked = {key: value for key, value in asdict(calibration).items() if key != "batch_size"}
    asked["length"] = sample_length(network, calibration.length)
    return {
        "model_files": checkpoint.digests,
        "samples": {**asked, "data": None if calibration.data is None else str(calibration.data)},
        "samples_fingerprint": selected.samples.fingerprint(),
        "tokens": sum(len(ids) for ids in selected.samples.ids),
        "notes": selected.notes,
        "versions": {
            "hesse": version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


class _Estimation:
    """One run that fills a folder."""

    def __init__(
        self,
        folder: Path,
        dense: Network,
        network: Network,
        selected: Selection,
        calibration: Calibration,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.folder, self.dense, self.network = folder, dense, network
        self.samples, self.probes, self.calibration = selected.samples, selected.probes, calibration
        self.clock, self.progress = clock, progress
        self.length = self.samples.longest
        self.files: dict[str, dict[str, str]] = {}  # by kind and layer
        self.written = 0

    def run(self, kinds: list[Kind]) -> dict[str, Any]:
        """Estimate everything; where each layer's is."""
        self.files = {kind: {} for kind in kinds}
        backwards: list[Kind] = [kind for kind in kinds if kind != "gram"]
        with tempfile.TemporaryDirectory(dir=self.folder) as waiting:
            sensitivities = self._walk_back(backwards, Path(waiting)) if backwards else {}
            if "kronecker" not in kinds:
                sensitivities = self._probe(Path(waiting))
            if "gram" in kinds:
                self._grams(Path(waiting))
        with self.clock.phase("write"):
            tensors = {name: value.cpu().contiguous() for name, value in sensitivities.items()}
            save_file(tensors, self.folder / SENSITIVITIES_FILE)
        return {"curvatures": self.files}

    def _probe(self, folder: Path) -> dict[str, Tensor]:
        """E[ggᵀ] at the layers' outputs, from some of the samples."""
        self.progress.begin("probe the loss", 2 * len(self.network.blocks) + 1)
        needs, seed = {layer.name: ("output factor",) for layer in self.network.layers}, self.calibration.seed
        known = probe(self.network, self.probes, needs, folder, seed, self.clock, self.progress.advance)
        return {layer: statistics["output factor"] for layer, statistics in known.items()}

    def _grams(self, folder: Path) -> None:
        """The Gram of each layer's inputs; one file for layers with the same inputs."""
        self.progress.begin("estimate", len(self.network.blocks))
        with self.clock.phase("calibrate"):
            batch_size = self.calibration.batch_size or calibration_batch(self.length)
            batches = start(self.network, self.samples.batches(batch_size), TensorStore(folder))
        needs = {layer.name: ("inputs",) for layer in self.network.layers}
        for _, layers in calibrated_blocks(self.network, batches, needs, clock=self.clock):
            written: tuple[Gram, str] | None = None  # the last Gram, and its file
            for layer, statistics in layers:
                if not statistics.called:
                    continue
                if written is None or statistics.gram is not written[0]:
                    written = (statistics.gram, self._save("gram", statistics.gram))
                self.files["gram"][layer.name] = written[1]
            self.progress.advance()

    def _walk_back(self, kinds: list[Kind], folder: Path) -> dict[str, Tensor]:
        """Kronecker factors and the Fisher's diagonal, written block by block; the diagonals of the output factors."""
        self.progress.begin("walk back", 2 * len(self.network.blocks) + 1)
        one = "fisher" in kinds  # its gradients are of single samples, which experts mix
        size = 1 if one else self.calibration.batch_size or calibration_batch(self.length)
        with self.clock.phase("probe"):
            flows = start(self.dense, self.samples.batches(size), TensorStore(folder, "forward"))
        inputs = forward_walk(self.dense, flows, flows, self.clock, self.progress.advance)
        found: dict[str, Tensor] = {}
        with self.clock.phase("probe"):
            seed, shelf = self.calibration.seed, TensorStore(folder, "gradient")
            walk = BackwardPass(self.dense, flows, inputs, seed, apart=one, shelf=shelf)
            self.progress.advance()
            for block, passages in walk:
                parts = {layer.name: [layer_part(layer)] for layer in block.layers}
                sums = Sums(parts, {layer.name: layer.parameter for layer in block.layers}, kinds)
                for passage in passages:
                    sums.add(passage)
                sums.leave_out_unreached()
                estimates = sums.estimates(walk.scale, walk.origin.matrix, walk.origin.unit)
                for name in parts:
                    if isinstance(kronecker := estimates.kronecker.get(name), Kronecker):
                        self.files["kronecker"][name] = self._save("kronecker", kronecker)
                        found[name] = kronecker.output_factor.diagonal().clone()  # a view would keep it all
                    if isinstance(fisher := estimates.fisher.get(name), Diagonal):
                        self.files["fisher"][name] = self._save("fisher", fisher)
                self.progress.advance()
        return found

    def _save(self, kind: Kind, curvature: Curvature) -> str:
        """Write a curvature; the name of its file."""
        self.written += 1
        name = f"{kind}-{self.written:05d}.safetensors"
        with self.clock.phase("write"):
            save_curvature(curvature, self.folder / name)
        return name
