"""`hesse estimate`: a model's curvature to disk, a block at a time."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from hesse.compression.dense import dense_pass
from hesse.compression.inputs import InputGrams
from hesse.compression.output import check_output, temporary_folder
from hesse.compression.plan import open_networks
from hesse.compression.statistics import INDEX_FILE, SENSITIVITIES_FILE, file_digests
from hesse.compression.tokens import Calibration, sample_length, select_samples
from hesse.curvature import Gram
from hesse.errors import OptionError
from hesse.estimation import save_curvature
from hesse.evaluation.evaluate import evaluation_batch, vocabulary
from hesse.models.network import Layer
from hesse.models.stream import advance_with_stops, calibration_batch, start
from hesse.models.writer import write_text
from hesse.progress import Clock, Progress


def estimate_checkpoint(
    model: Path,
    out: Path,
    calibration: Calibration,
    *,
    device: torch.device,
    overwrite: bool,
    progress: Progress,
    version: str,
) -> dict[str, Any]:
    """Estimate the curvature of the model folder `model` on its own, uncompressed inputs, into a new folder `out`.

    Returns:
        The content of its index: what was estimated, from what, with what, and the seconds by phase.

    Raises:
        HesseError: something is wrong with the model, the data, the options or the output; nothing is left at `out`.
    """
    clock = Clock()
    check_output(out, model, overwrite, INDEX_FILE)
    if calibration.data is not None and not isinstance(calibration.data, str | Path):
        raise OptionError("statistics name their data, so that it can be read again: give a file, not token ids")
    with clock.phase("read"):
        checkpoint, dense, network = open_networks(model, device)
        selected = select_samples(model, calibration, network)
    grams: dict[str, str] = {}
    expected_bytes = sum(4 * layer.weight.shape[1] ** 2 for layer in network.layers)
    with temporary_folder(out, expected_bytes) as folder:
        progress.begin("probe the loss", 2 * len(network.blocks) + 1)
        length = max(len(ids) for ids in selected.samples.ids)
        probes = selected.probes.batches(evaluation_batch(vocabulary(dense), length))
        sensitivities = dense_pass(dense, probes, probes, calibration.seed, clock, progress.advance).sensitivities
        progress.begin("estimate", len(network.blocks))
        with clock.phase("calibrate"):
            batch_size = calibration.batch_size or calibration_batch(length)
            flows = start(network, selected.samples.batches(batch_size))
        inputs, count = InputGrams(clock), 0
        last: Gram | None = None  # what was written last

        def keep(layer: Layer) -> None:
            nonlocal last, count
            gram = inputs.gram()
            with clock.phase("write"):
                if gram is not last:
                    last, count = gram, count + 1
                    save_curvature(gram, folder / _gram_file(count))
                grams[layer.name] = _gram_file(count)

        for index, block in enumerate(network.blocks):
            with clock.phase("read"), network.loaded(block), clock.phase("calibrate"):
                advance_with_stops(flows, block, index, inputs.collect, keep)
            progress.advance()
        with clock.phase("write"):
            save_file({name: value.cpu() for name, value in sensitivities.items()}, folder / SENSITIVITIES_FILE)
            asked = {key: value for key, value in asdict(calibration).items() if key != "batch_size"}
            asked["length"] = sample_length(network, calibration.length)
            content = {
                "model_files": file_digests(checkpoint),
                "samples": {**asked, "data": None if calibration.data is None else str(calibration.data)},
                "samples_fingerprint": selected.samples.fingerprint(),
                "tokens": sum(len(ids) for ids in selected.samples.ids),
                "notes": selected.notes,
                "grams": grams,
                "versions": {
                    "hesse": version,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                },
            }
            content["seconds"] = {"total": clock.total, **clock.seconds}
            write_text(folder / INDEX_FILE, json.dumps(content, indent=2) + "\n")
    return content


def _gram_file(number: int) -> str:
    return f"gram-{number:05d}.safetensors"
