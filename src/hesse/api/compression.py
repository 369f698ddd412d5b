"""Change a model, or prepare for it: compress, rotate, plan and estimate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hesse.api.options import Data, calibration_of, find_device
from hesse.checkpoints.locate import locate
from hesse.errors import OptionError
from hesse.jobs.compress import compress_checkpoint
from hesse.jobs.estimate import estimate_checkpoint
from hesse.jobs.memory import bytes_of
from hesse.jobs.report import CompressionReport
from hesse.jobs.rotate import RotationReport, rotate_checkpoint
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method
from hesse.planning.budget import Budget, BudgetPlan, BudgetRequest, plan_budget
from hesse.progress import Progress, Silence
from hesse.version import __version__


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
    allocation: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    memory: str | int | None = None,
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
        format: `auto`, `pack-quantized`, `int-quantized`, `dense` or `low-rank`.
        size: a budget for the weights' files, such as "40%" of the dense ones, "5MB", or a number of bytes. With this,
            `mean_bits` or `loss` the recipe is planned: see `plan`.
        mean_bits: a budget of bits a weight over the planned layers, scales included.
        loss: a budget of predicted loss in nats per token.
        target: `transformers`, `vllm` or `any`: refuse, or do not plan, what that loader does not serve.
        allocation: how a budget's choices are priced: `hawq` or `hawq-v2`; None solves every layer for every choice.
        overwrite: whether a model folder at `out` may be replaced.
        restart: whether to lose what an unfinished run that was to write `out` had done; otherwise the same run goes on
            from there, to the same result bit for bit, and another one is refused.
        memory: the most that the process may take, such as "8GiB" or a number of bytes: what is kept in memory and what
            on disk follows from it. None for most of what is free.
        measure: also measure what each layer costs alone, how far the quadratic model holds, and the loss on text that
            calibration saw, and write continuations: what `hesse.reporting.compression_page` shows. It costs time.
        progress: told how far the run is.

    Returns:
        What was done to each layer, sizes in bytes, seconds by phase, and losses in nats per token.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    folder, statistics = locate(model), None if curvature is None else Path(curvature)
    calibration = calibration_of(data, samples, length, seed, batch_size)
    wanted: Recipe | BudgetRequest
    if any(budget is not None for budget in (size, mean_bits, loss)):
        if recipe is not None:
            raise OptionError("a recipe leaves nothing to plan: leave out the recipe, or the budget")
        wanted = _request(Budget(size, mean_bits, loss), method, options, ignore, target, allocation)
    elif allocation is not None:
        raise OptionError("an allocation is how a budget is shared out: give a size, mean bits or a loss")
    elif recipe is None:
        wanted = find_method(method, "compress").recipe(options or Options(), tuple(ignore))
    elif options is not None or ignore:
        raise OptionError("a recipe says everything itself: leave out options and ignore")
    else:
        wanted = recipe
    return compress_checkpoint(
        folder,
        Path(out),
        wanted,
        calibration,
        statistics,
        target=target,
        format=format,
        device=find_device(device),
        overwrite=overwrite,
        restart=restart,
        memory=bytes_of(memory) if isinstance(memory, str) else memory,
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
    allocation: str | None = None,
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
        _request(Budget(size, mean_bits, loss), method, options, ignore, target, allocation),
        calibration_of(data, samples, length, seed, batch_size),
        None if curvature is None else Path(curvature),
        format=format,
        device=find_device(device),
        progress=progress or Silence(),
    )


def _request(
    budget: Budget,
    method: str,
    options: Options | None,
    ignore: Sequence[str],
    target: str | None,
    allocation: str | None,
) -> BudgetRequest:
    kept = tuple(ignore)
    return BudgetRequest(
        budget, find_method(method, "compress"), options or Options(), kept, target or "transformers", allocation
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

    The folder holds for each linear layer what `curvatures` names, E[ggᵀ] at its outputs, and fingerprints of model and
    data. "gram" is the second moment of the layer's inputs, which `compress` needs; "kronecker" its K-FAC factors, from
    which `compress` and `inspect` predict; "fisher" the diagonal of the Fisher, of whole sequences. Both are the true
    Fisher with sampled labels, in nats per token. Other arguments are those of `compress`.

    Returns:
        The folder's index: what was estimated, from what, and the seconds by phase.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    calibration = calibration_of(data, samples, length, seed, batch_size)
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


def rotate(
    model: str | Path,
    out: str | Path,
    *,
    kind: str = "hadamard",
    data: Data = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RotationReport:
    """Write a model of the same function whose inputs and weights have no outliers, for whatever is to round it.

    Norms are folded into the layers behind them, the features that blocks add to are rotated, and each head's values.
    `kind` is `hadamard`, which looks at no data but to check the result, or `kurtail`, learned on the samples. Llama,
    Mistral, Qwen2, Qwen3 and Gemma are rewritten. Other arguments are those of `compress`.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do; nothing is left at `out` then.
    """
    return rotate_checkpoint(
        locate(model),
        Path(out),
        kind,
        calibration_of(data, samples, length, seed, batch_size),
        device=find_device(device),
        overwrite=overwrite,
        progress=progress or Silence(),
        name=str(model),
    )
