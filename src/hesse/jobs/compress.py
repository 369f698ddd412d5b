"""`hesse compress`: compress a model from disk to disk, or a module in memory."""

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hesse.checkpoints.locate import locate
from hesse.curvature import Loss
from hesse.data.batches import token_records
from hesse.data.selection import SAMPLES, Calibration
from hesse.errors import OptionError
from hesse.estimation import Statistics
from hesse.jobs.compress_folder import CompressionRequest, compress_folder
from hesse.jobs.job import Job
from hesse.jobs.options import check_model, run_options
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method, methods_of
from hesse.modules.compress import compress_in_memory
from hesse.passes.per_sample import FisherKind
from hesse.planning.budget import Budget, BudgetRequest
from hesse.planning.singular_directions import directions_recipe
from hesse.progress import Progress
from hesse.result import Result

# Why arguments have no meaning for a module in memory.
FOR_FILES = {
    "out": "is a folder, and a module stays in memory",
    "statistics": "are of the files of a checkpoint",
    "size": "is a budget of the files of a checkpoint",
    "mean_bits": "is a budget that is planned on the files of a checkpoint",
    "loss": "is a budget that is planned on the files of a checkpoint (a loss is given as loss_function)",
    "target": "is a program that loads files",
    "allocation": "is how a budget of files is shared out",
    "memory": "bounds how much of a checkpoint is in memory, and a module is there as a whole",
    "overwrite": "is of a folder",
    "restart": "is of a run to a folder",
    "measure": "is of a checkpoint beside the dense one",
    "dry_run": "says what a run to a folder would take",
    "format": "is how files are written",
    "device": "is where a checkpoint is loaded, and a module is already somewhere",
}


def compress(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    method: str = DEFAULT_METHOD,
    recipe: Recipe | None = None,
    options: Options | None = None,
    ignore: Sequence[str] = (),
    data: Any = None,
    statistics: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    bos: bool | None = None,
    device: str = "auto",
    format: str = "auto",
    size: str | int | None = None,
    mean_bits: float | None = None,
    loss: float | None = None,
    target: str | None = None,
    allocation: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    memory: str | int | None = None,
    measure: bool = False,
    layers: Sequence[str] = ("*",),
    loss_function: Loss | nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    kind: FisherKind = "sampled",
    progress: Progress | None = None,
) -> Result[Any]:
    """Compress a language model or encoder on disk into a new folder that other programs load, or a module in memory.

    A killed run on disk resumes after the last block it finished, with the same result bit for bit. A module
    is copied and the copy is changed: see `hesse.modules.compress.compress_in_memory`, which takes `layers`,
    `loss_function`, `forward` and `kind`; options that concern files are refused for it.

    Args:
        model: a model folder, `default`, or a hub id, dense; or any `torch.nn.Module`.
        out: the folder to write; it must not exist unless `overwrite`. None for a module.
        method: a row of `hesse methods`, changed by `options`; or give a whole `recipe` instead.
        recipe: rules per layer, from `hesse.methods.load_recipe` or built in Python.
        options: options such as `Options(bits=3, group_size=64)`; None keeps the method's default.
        ignore: patterns of layers to leave unchanged.
        data: a text, JSON lines or parquet file, a datasets id, a `datasets.Dataset` with a column `input_ids`, or
            lists of token ids; None for the shipped text. For a module also batches: (inputs, targets) pairs or
            dictionaries.
        statistics: a folder of `estimate`, in place of calibration; `data` then only checks the result. Each layer is
            solved for the inputs that the dense model gives it.
        samples: calibration samples; None for 128. For batches of a module neither this, `length` nor `batch_size`.
        length: tokens per sample; None for 2048 or the model's positions, whichever is less.
        seed: seed of the choice of samples and of sampled labels.
        batch_size: samples per batch; it changes memory and time, not the result.
        bos: start windows of text with BOS, or not; None for what the tokenizer does.
        device: `auto`, `cpu`, or `cuda`.
        format: `auto`, `pack-quantized`, `int-quantized`, `dense` or `low-rank`.
        size: a budget for the weights' files, such as "40%" of the dense ones, "5MB", or a number of bytes. With this,
            `mean_bits` or `loss` the recipe is planned: see `plan`. For the method "acip" the size of the linear layers
            that are not ignored, of which its one ranking of singular directions takes any share.
        mean_bits: a budget of bits a weight over the planned layers, scales included.
        loss: a budget of predicted loss in nats per token.
        target: `transformers`, `vllm` or `any`: refuse, or do not plan, schemes that this loader does not support.
        allocation: the predictor of a budget's costs: `hawq` or `hawq-v2`; None solves every layer for every choice.
        overwrite: replace a model folder at `out`.
        restart: discard the work of an interrupted run to `out` instead of resuming it.
        dry_run: only estimate the bytes, memory and time of the run; write nothing.
        memory: the memory limit of the process, such as "8GiB" or a number of bytes; it determines which activations
            are kept on disk. None for most of the free memory.
        measure: also measure the cost of each layer alone, the range of the quadratic model, and the loss on text of
            the calibration, and generate continuations, for `hesse.reporting.compression_page`. It takes time.
        layers: patterns of the layers of a module to change.
        loss_function: the loss of a module; None for cross-entropy, or a language model's own.
        forward: `forward(model, inputs)` gives the outputs of a module.
        kind: "sampled" or "empirical" labels for the Fisher of a module.
        progress: receives each phase and step.

    Returns:
        A record of each layer, sizes in bytes, seconds by phase, and losses in nats per token.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do; nothing is left at `out`.
    """
    arguments = dict(locals())
    if isinstance(model, nn.Module):
        for name, why in FOR_FILES.items():
            if arguments[name] != signature(compress).parameters[name].default:
                raise OptionError(f"{name} {why}: save the model and give the folder, or leave it out")
        return compress_in_memory(**{name: arguments[name] for name in signature(compress_in_memory).parameters})
    check_model(model)
    samples = SAMPLES if samples is None else samples
    if out is None:
        raise OptionError("a model on disk needs a folder to write: give out")
    if tuple(layers) != ("*",) or loss_function is not None or forward is not None or kind != "sampled":
        raise OptionError("layers, loss_function, forward and kind are for modules: give a recipe for other layers")
    if "input_ids" in (getattr(data, "column_names", None) or ()):
        data = token_records(data)
    calibration = Calibration(data, samples, length, seed, batch_size, bos)
    run = run_options(device, memory, overwrite, restart, dry_run, progress)
    budgeted = any(given is not None for given in (size, mean_bits, loss))
    aim: Recipe | BudgetRequest
    if recipe is None and method in methods_of("compress_to_size"):
        if size is None or statistics is None or any(x is not None for x in (mean_bits, loss, allocation, options)):
            raise OptionError(
                f"the method {method} takes a size of the linear layers and statistics, no other budget and no "
                "options: give --size 60% and --statistics DIR, which `hesse estimate --curvature gram,kronecker` wrote"
            )
        ranked = Statistics(Path(statistics))
        aim = directions_recipe(locate(model), ranked, size, tuple(ignore), run.device, run.progress)
    elif budgeted:
        if recipe is not None:
            raise OptionError("a recipe leaves nothing to plan: leave out the recipe, or the budget")
        budget, chosen = Budget(size, mean_bits, loss), find_method(method, "compress")
        aim = BudgetRequest(budget, chosen, options or Options(), tuple(ignore), target, allocation)
    elif allocation is not None:
        raise OptionError("an allocation is how a budget is shared out: give a size, mean bits or a loss")
    elif recipe is None:
        aim = find_method(method, "compress").recipe(options or Options(), tuple(ignore))
    elif options is not None or ignore:
        raise OptionError("a recipe says everything itself: leave out options and ignore")
    else:
        aim = recipe
    estimated = None if statistics is None else Statistics(Path(statistics))
    with Job("compress", str(model), [locate(model)], Path(out), calibration, run) as job:
        return Result(compress_folder(job, CompressionRequest(aim, estimated, format, target), measure))
