"""Look at a model: evaluate and inspect."""

from pathlib import Path

import torch

from hesse.api.options import Data, at_least, find_device
from hesse.checkpoints.locate import locate
from hesse.data import read_samples
from hesse.data.selection import sample_length
from hesse.evaluation import Evaluation, evaluate_checkpoint
from hesse.formats import open_checkpoint
from hesse.formats.adapter import AdaptedCheckpoint, layer_paths
from hesse.inspection import Inspection, inspect_checkpoint
from hesse.networks.network import Network
from hesse.passes.batch_sizes import evaluation_batch
from hesse.progress import Progress, Silence


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    data: Data = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Loss, perplexity and size of a model on disk, and its divergence from a reference.

    Args:
        model: a model folder, `default`, or a hub id; dense, or as `compress` and llm-compressor write it.
        reference: the dense model to compare with.
        adapter: a LoRA folder of PEFT, such as `repair` writes, to add to the model.
        data: as for `compress`; None for the shipped held-out text.
        samples: windows of text, from the first on; None for all.
        length: tokens a window; None for 2048, or as many as the model has positions for.
        batch_size: windows that go through the model together.
        device: `auto`, `cpu`, or `cuda`.
        progress: told how far the run is.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do.
    """
    at_least("--samples", samples, 1)
    at_least("--length", length, 2)
    at_least("--batch-size", batch_size, 1)
    place = find_device(device)
    folder = locate(model)
    checkpoint = open_checkpoint(folder)
    network = Network(checkpoint, torch.float32, place)
    if adapter is not None:
        checkpoint = AdaptedCheckpoint(folder, Path(adapter), layer_paths(network))
    tokens = sample_length(network, length)
    chosen, _ = read_samples(
        data,
        folder,
        count=samples,
        length=tokens,
        seed=0,
        purpose="evaluation",
        limit=network.input_limit,
    )
    batches = chosen.batches(batch_size or evaluation_batch(network, chosen.longest))
    dense = None if reference is None else open_checkpoint(locate(reference))
    return evaluate_checkpoint(checkpoint, batches, dense, place, progress or Silence())


def inspect(
    model: str | Path,
    *,
    data: Data = None,
    curvature: str | Path | None = None,
    samples: int = 4,
    length: int = 256,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Inspection:
    """What the loss looks like around a language model, and which curvature predicts changes of it.

    Each linear layer is changed alone, to 8, 4, 3 and 2 bits and to half of its weights zero; what each curvature
    predicts is held beside what was measured. The whole model is in memory, in float32.

    Args:
        model: a model folder, `default`, or a hub id; dense.
        data: as for `compress`; None for the shipped calibration text.
        curvature: a folder that `estimate` wrote, to predict from in place of these samples.
        samples: windows of text.
        length: tokens a window, or as many as the model has positions for.
        seed: of the choice of samples, of sampled labels and of random vectors.
        device: `auto`, `cpu`, or `cuda`.
        progress: told how far the run is.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do.
    """
    at_least("--samples", samples, 2)
    at_least("--length", length, 2)
    return inspect_checkpoint(
        locate(model),
        str(model),
        data,
        None if curvature is None else Path(curvature),
        samples,
        length,
        seed,
        find_device(device),
        progress or Silence(),
    )
