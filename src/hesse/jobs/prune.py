"""`hesse.prune`: prune a model, on disk or in memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hesse.curvature import Loss
from hesse.data.batches import check_batches
from hesse.data.selection import Calibration
from hesse.errors import OptionError
from hesse.jobs.options import check_model, run_options
from hesse.jobs.prune_blocks import prune_blocks
from hesse.jobs.prune_hidden import prune_hidden
from hesse.modules.prune import build_strategy, find_kinds, prune_in_memory
from hesse.progress import Progress
from hesse.result import Result

ON_DISK = ("blocks", "hidden")
DEFAULTS = {"blocks": "loss", "hidden": "modegpt-mlp"}


def prune(
    model: str | Path | nn.Module,
    out: str | Path | None = None,
    data: Any = None,
    *,
    what: str | Sequence[str] | None = None,
    method: str | None = None,
    loss_function: Loss | nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    layers: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    samples: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    bos: bool | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result[Any]:
    """Prune the parts of a model that cost its loss least: weights, heads, hidden units, channels, experts, blocks.

    A module stays as it is; the result holds a smaller or sparser copy, in eval mode. Of a model on disk, `blocks` and
    `hidden` units can be pruned, and the folder `out` is written, which transformers loads; zeros in single weights are
    `hesse.compress`'s `sparsity`. A method has `options` of its own, which `hesse methods METHOD` lists, such as:

    - `sparsity`: for weights, the share of zeros, or a pattern such as "2:4".
    - `keep`: for all other parts, the share that stays.
    - `loss`: for methods that measure, by how much the loss may rise.

    Args:
        model: an `nn.Module`; or a model folder, `default`, or a hub id, which is dense.
        out: the folder to write, for a model on disk; it must not exist unless `overwrite`.
        data: for a module (inputs, targets) pairs or dictionaries with `labels`, such as a DataLoader or a list,
            walked once and kept; on disk a text, JSON lines or parquet file, a datasets id, or lists of token ids, None
            for the shipped text.
        what: "weights", "heads", "hidden", "channels", "experts" or several of the last four, "groups" for those of
            heads, hidden units and channels that there are, "head-dimensions", or "blocks". None for those of the
            method's row.
        method: a row of `hesse methods`, with or without "-groups", or any score in `hesse.scores.SCORES` that judges
            such parts. None for "magnitude" of weights, "obs" of groups, "loss" of blocks. Better than magnitudes
            is "m-fac-network", which needs a gradient of the whole network for each of some hundred samples.
        loss_function: for a module, a Loss of `hesse.curvature`, or torch's CrossEntropyLoss or MSELoss; None for
            cross-entropy.
        forward: for a module, `forward(model, inputs)` gives the outputs; by default as in `compress`.
        layers: for weights of a module, patterns of the names of layers to prune.
        ignore: for weights of a module, patterns of the names of layers to leave.
        samples: on disk, calibration samples; None for 16 that blocks are judged by, or 128.
        length: on disk, tokens per sample; None for 2048 or the positions of the model, if less.
        batch_size: on disk, samples that go through the model together.
        bos: on disk, start windows of text with BOS, or not; None for what the tokenizer does.
        seed: seed of random choices and of sampled labels.
        device: on disk, `auto`, `cpu`, or `cuda`.
        overwrite: on disk, replace a model folder at `out`.
        restart: on disk, discard what an interrupted run to `out` has done, rather than resume it.
        dry_run: on disk, only say what the run would take: bytes, memory and time. Nothing is written.
        progress: receives each phase and step.
        options: options of the method by name.

    Returns:
        What was removed and what it cost; of a module the pruned copy too.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do. Options are checked before any work, and
            nothing is left at `out`.
    """
    if isinstance(model, nn.Module):
        if out is not None:
            raise OptionError("a module is pruned in memory: leave out `out`, and save the result's model")
        of_disk: dict[str, Any] = {
            "samples": samples,
            "length": length,
            "batch_size": batch_size,
            "bos": bos,
            "overwrite": overwrite or None,
            "restart": restart or None,
            "dry_run": dry_run or None,
            "device": None if device == "auto" else device,
        }
        for name, value in of_disk.items():
            if value is not None:
                raise OptionError(f"{name} is for models on disk: leave it out for a module")
        check_batches(data)
        return prune_in_memory(
            model,
            data,
            what=what,
            method=method,
            loss_function=loss_function,
            forward=forward,
            seed=seed,
            layers=layers,
            ignore=ignore,
            **options,
        )
    check_model(model)
    (kind, *others) = find_kinds(what, method)
    if others or kind not in ON_DISK:
        raise OptionError(
            f"on disk {' and '.join(ON_DISK)} are pruned, not {kind}: for zeros in weights use hesse compress "
            "--sparsity, and for other parts give hesse.prune a module"
        )
    if out is None:
        raise OptionError("out is missing: give the folder to write")
    if loss_function is not None or forward is not None or tuple(layers) != ("*",) or ignore:
        raise OptionError("loss_function, forward, layers and ignore are for modules: leave them out")
    strategy = build_strategy(kind, method or DEFAULTS[kind], options)
    strategy.check()
    samples = samples if samples is not None else 16 if kind == "blocks" else 128
    calibration = Calibration(data, samples, length, seed, batch_size, bos)
    run = run_options(device, None, overwrite, restart, dry_run, progress)
    run_on = prune_blocks if kind == "blocks" else prune_hidden
    return run_on(model, Path(out), strategy, calibration, run)
