"""Fine-tune a compressed network, and keep it compressed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesse.curvature import Loss
from hesse.data.batches import module_objective
from hesse.errors import OptionError
from hesse.methods import Options, find_method
from hesse.progress import Progress
from hesse.result import NOT_WRITTEN, Report, Result
from hesse.training.checkpoints import Checkpoints, run_reported
from hesse.training.held import Held, held_zeros
from hesse.training.loop import StepRule, TrainingLoop
from hesse.training.training import Training
from hesse.training.trainings import TRAININGS, TrainingRequest


@dataclass(frozen=True, kw_only=True)
class FinetuneReport(Report):
    """Report of a training.

    `losses` are those of each step's batches before the step; `free` are the tensors that were trained in place of each
    parametrized weight.
    """

    verb: str = "finetune"
    losses: tuple[float, ...]
    free: dict[str, tuple[Tensor, ...]] = field(metadata=NOT_WRITTEN, repr=False)


@torch.inference_mode(False)
@torch.enable_grad()
def finetune(
    model: nn.Module,
    data: Any,
    training: Training,
    *,
    loss_function: Loss | nn.Module | None = None,
    method: str = "finetune",
    options: Options | None = None,
    layers: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    held: Mapping[str, Held] | None = None,
    rule: StepRule | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: Progress | None = None,
) -> Result[FinetuneReport]:
    """Train the parameters of `model` that require a gradient, in place, and keep parametrizations after every step.

    `method` is a row of `hesse methods training` that this verb runs, with its `options`, for the layers that match one
    of `layers` and none of `ignore`; by default it keeps the zeros of the model. Without a row, `held` gives
    parametrizations by the names of weights, and `rule` the direction of a step in place of the gradient.

    `data` can be iterated repeatedly: (inputs, targets) pairs, dictionaries with `labels`, or a DataLoader of either.
    `loss_function` is a Loss of `hesse.curvature`, or torch's CrossEntropyLoss or MSELoss; None for cross-entropy.
    `forward(model, inputs)` computes the outputs; by default `model(inputs)`, of a dictionary `model(**inputs)`, and of
    a transformers model the logits. The model keeps its mode: call `model.train()` first to enable dropout and batch
    statistics.

    With a folder `checkpoint` the training is saved there. After an interruption the same call with the same model,
    data and options resumes and ends with bitwise equal weights. Random numbers of libraries other than torch are not
    reproduced.

    Raises:
        OptionError: an option is not valid for this model, loss function or data.
        DataError: there is no data, or the loss is not finite; the model is in its state after the previous step.
        OutputError: the folder holds another training, or cannot be written.
    """
    objective = module_objective(model, data, loss_function, forward)
    row, options = find_method(method, "finetune"), Options() if options is None else options
    if held is None and rule is None:
        row.check_options(options)
        request = TrainingRequest(model, training, row, options, layers, ignore)
        held, rule = TRAININGS.find(row.solver).set_up(request)
    elif method != "finetune" or options != Options():
        raise OptionError("a method says what is held and how it steps: leave out held and rule, or method and options")
    loop = TrainingLoop(objective, training, held_zeros(model) if held is None else held, rule)
    settings = "" if method == "finetune" else f"{method} {options} {layers} {ignore}"
    kept = None if checkpoint is None else Checkpoints(checkpoint, checkpoint_every, loop, settings)
    if kept is not None:
        kept.resume()
    run_reported("finetune", loop, partial(loop.run, training.steps), kept, progress)
    free = {name: tuple(part.detach() for part in loop.free[name]) for name in loop.held}
    report = FinetuneReport(model=type(model).__name__, method=method, losses=tuple(loop.losses), free=free)
    return Result(report, model)
