"""`hesse.compress`, `hesse.estimate`, `hesse.evaluate` and the others: what the command line does, from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hesse.benchmarking import RUNTIMES, Benchmark, benchmark_checkpoint
from hesse.compression import (
    Budget,
    BudgetPlan,
    Calibration,
    CompressionReport,
    compress_checkpoint,
    estimate_checkpoint,
    plan_budget,
)
from hesse.compression.output import check_output
from hesse.compression.tokens import sample_length
from hesse.data import read_samples
from hesse.errors import OptionError
from hesse.evaluation import Evaluation, evaluate_checkpoint
from hesse.evaluation.evaluate import evaluation_batch, vocabulary
from hesse.exporting import ExportReport, export_checkpoint
from hesse.formats import open_checkpoint
from hesse.inspection import Inspection, inspect_checkpoint
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method
from hesse.models.locate import locate
from hesse.models.network import Network
from hesse.progress import Progress, Silence
from hesse.version import __version__

Data = str | Path | list[list[int]] | None


def compress(
    model: str | Path,
    out: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    recipe: Recipe | None = None,
    options: Options | None = None,
    ignore: Sequence[str] = (),
    data: Data = None,
    curvature: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    format: str = "auto",
    size: str | int | None = None,
    mean_bits: float | None = None,
    loss: float | None = None,
    target: str | None = None,
    overwrite: bool = False,
    measure: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress a language model or encoder on disk into a new folder that other programs load.

    Args:
        model: a model folder, `default`, or a hub id.
        out: the folder to write; it must not exist unless `overwrite`.
        method: a row of `hesse methods`, changed by `options`; or give a whole `recipe` instead.
        recipe: what to do per layer, from `hesse.load_recipe` or built in Python.
        options: `Options(bits=3, group_size=64)` and the like; what is None is the method's own choice.
        ignore: patterns of layer names to leave as they are.
        data: a text, JSON lines or parquet file, a datasets id, or lists of token ids; None for the shipped text.
        curvature: a folder that `estimate` wrote, in place of calibration; `data` then only checks the result.
        samples: calibration samples.
        length: tokens a sample; None for 2048, or as many as the model has positions for.
        seed: of the choice of samples and of sampled labels.
        batch_size: samples that go through the model together; it changes memory and time, not the result.
        device: `auto`, `cpu`, or `cuda`.
        format: `auto`, `pack-quantized`, `dense` or `low-rank`.
        size: a budget for the weights' files, such as "40%" of the dense ones, "5MB", or a number of bytes. With this,
            `mean_bits` or `loss` the recipe is planned: see `plan`.
        mean_bits: a budget of bits a weight over the planned layers, scales included.
        loss: a budget of predicted loss in nats per token.
        target: `transformers`, `vllm` or `any`: refuse, or do not plan, what that loader does not serve.
        overwrite: whether a model folder at `out` may be replaced.
        measure: also measure what each layer costs alone, how far the quadratic model holds, and the loss on text that
            calibration saw, and write continuations: what `hesse.reporting.compression_page` shows. It costs time.
        progress: told how far the run is.

    Returns:
        What was done to each layer, sizes in bytes, seconds by phase, and losses in nats per token.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    folder, statistics = locate(model), None if curvature is None else Path(curvature)
    calibration = _calibration(data, samples, length, seed, batch_size)
    planned, chosen = None, recipe
    if any(budget is not None for budget in (size, mean_bits, loss)):
        if recipe is not None:
            raise OptionError("a recipe leaves nothing to plan: leave out the recipe, or the budget")
        check_output(Path(out), folder, overwrite)
        planned = plan(
            model,
            method=method,
            options=options,
            ignore=ignore,
            data=data,
            curvature=curvature,
            samples=samples,
            length=length,
            seed=seed,
            batch_size=batch_size,
            device=device,
            format=format,
            size=size,
            mean_bits=mean_bits,
            loss=loss,
            target=target,
            progress=progress,
        )
        chosen = planned.recipe
    elif chosen is None:
        chosen = find_method(method).recipe(options or Options(), tuple(ignore))
    elif options is not None or ignore:
        raise OptionError("a recipe says everything itself: leave out options and ignore")
    return compress_checkpoint(
        folder,
        Path(out),
        chosen,
        calibration,
        statistics,
        target=target,
        planned=planned,
        format=format,
        device=find_device(device),
        overwrite=overwrite,
        measured=measure,
        progress=progress or Silence(),
        name=str(model),
        version=__version__,
    )


def plan(
    model: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    options: Options | None = None,
    ignore: Sequence[str] = (),
    data: Data = None,
    curvature: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    format: str = "auto",
    size: str | int | None = None,
    mean_bits: float | None = None,
    loss: float | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> BudgetPlan:
    """The recipe that shares one budget out among the layers at the least predicted loss; nothing is written.

    Exactly one of `size`, `mean_bits` and `loss` is given; with `loss` the smallest such recipe is found. `options`
    that are given hold for all layers. Arguments are those of `compress`; `target` is `transformers` if absent.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; a budget that cannot be met says what can.
    """
    return plan_budget(
        locate(model),
        Budget(size, mean_bits, loss),
        find_method(method),
        options or Options(),
        tuple(ignore),
        _calibration(data, samples, length, seed, batch_size),
        None if curvature is None else Path(curvature),
        target=target or "transformers",
        format=format,
        device=find_device(device),
        progress=progress or Silence(),
    )


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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Estimate a model's curvature once, into a folder from which `compress` tries any number of schemes.

    The folder holds for each linear layer what `curvatures` names, E[g²] at its outputs, and fingerprints of model and
    data. "gram" is the second moment of the layer's inputs, which `compress` needs; "kronecker" its K-FAC factors, from
    which `compress` and `inspect` predict; "fisher" the diagonal of the Fisher, of whole sequences. Both are the true
    Fisher with sampled labels, in nats per token. Other arguments are those of `compress`.

    Returns:
        The folder's index: what was estimated, from what, and the seconds by phase.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    calibration = _calibration(data, samples, length, seed, batch_size)
    return estimate_checkpoint(
        locate(model),
        Path(out),
        tuple(curvatures),
        calibration,
        device=find_device(device),
        overwrite=overwrite,
        progress=progress or Silence(),
        version=__version__,
    )


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
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
        data: as for `compress`; None for the shipped held-out text.
        samples: windows of text, from the first on; None for all.
        length: tokens a window; None for 2048, or as many as the model has positions for.
        batch_size: windows that go through the model together.
        device: `auto`, `cpu`, or `cuda`.
        progress: told how far the run is.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do.
    """
    _at_least("--samples", samples, 1)
    _at_least("--length", length, 2)
    _at_least("--batch-size", batch_size, 1)
    place = find_device(device)
    folder = locate(model)
    checkpoint = open_checkpoint(folder)
    network = Network(checkpoint, torch.float32, place)
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
    longest = max(len(ids) for ids in chosen.ids)
    batches = chosen.batches(batch_size or evaluation_batch(vocabulary(network), longest))
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
    _at_least("--samples", samples, 2)
    _at_least("--length", length, 2)
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


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "gguf",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model for another runtime, with the codes and scales of its layers as they are.

    Args:
        model: a model folder, `default`, or a hub id; dense, or as `compress` and llm-compressor write it.
        out: the file (gguf) or folder (onnx, torchao) to write; it must not exist unless `overwrite`.
        to: `gguf` for llama.cpp, `onnx` for onnxruntime, `torchao` for transformers with torchao.
        overwrite: whether a file or an exported folder at `out` may be replaced.
        progress: told how far the run is.

    Returns:
        How each layer is stored, and every departure from the checkpoint: scales that are rounded, by how much, and
        layers whose codes no type of the target holds.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    return export_checkpoint(
        locate(model),
        Path(out),
        to,
        overwrite=overwrite,
        progress=progress or Silence(),
        name=str(model),
        version=__version__,
    )


def benchmark(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    runtimes: Sequence[str] = tuple(RUNTIMES),
    prompt: int = 128,
    generate: int = 64,
    threads: int | None = None,
    repeats: int = 3,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure how fast a model loads, reads a prompt and decodes in each runtime on this machine, and its memory.

    Each measurement is a process of its own; models take turns. What a runtime needs is exported to a temporary folder
    first, and the export is not part of the time.

    Args:
        model: a model folder, `default`, or a hub id; dense or compressed.
        reference: the dense model to measure beside it.
        runtimes: of `transformers`, `llama.cpp`, `onnxruntime`, `torchao`; those not installed are listed as missing.
        prompt: tokens of the prompt.
        generate: tokens to decode, one by one.
        threads: of each runtime; None for as many as there are processors.
        repeats: processes for each measurement.
        progress: told how far the run is.

    Returns:
        Medians and spreads, and the divergence of each runtime from the same checkpoint in transformers.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do.
    """
    for option, value in (
        ("--prompt", prompt),
        ("--generate", generate),
        ("--repeats", repeats),
        ("--threads", threads),
    ):
        _at_least(option, value, 1)
    return benchmark_checkpoint(
        locate(model),
        None if reference is None else locate(reference),
        list(runtimes),
        prompt=prompt,
        generate=generate,
        threads=threads,
        repeats=repeats,
        progress=progress or Silence(),
        names=(str(model), None if reference is None else str(reference)),
        version=__version__,
    )


def find_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one.

    Raises:
        OptionError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise OptionError(f"there is no device {name!r} here: use auto, cpu or cuda") from None
    return device


def _calibration(data: Data, samples: int, length: int | None, seed: int, batch_size: int | None) -> Calibration:
    _at_least("--samples", samples, 1)
    _at_least("--length", length, 2)
    _at_least("--batch-size", batch_size, 1)
    return Calibration(data, samples, length, seed, batch_size)


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise OptionError(f"{option} is {value}, but must be at least {least}")
