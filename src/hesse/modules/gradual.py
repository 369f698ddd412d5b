"""Gradual pruning: any row of the table that prunes in one shot, a little at a time, with training in between."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesse.constraints import Sparse
from hesse.curvature import Loss
from hesse.data.batches import module_objective
from hesse.errors import OptionError
from hesse.methods import Options, Recipe, find_method
from hesse.methods.constraint_parts import parse_sparsity
from hesse.modules.compress import compress_in_memory
from hesse.progress import Progress
from hesse.result import Report, Result
from hesse.training.checkpoints import Checkpoints, run_reported
from hesse.training.held import HeldZeros
from hesse.training.loop import TrainingLoop
from hesse.training.movement import partial_pattern, share_of
from hesse.training.prunable import prunable, pruning_recipe
from hesse.training.schedules import SCHEDULES, GradualSchedule
from hesse.training.training import Training

FIRST = 0.7  # of the final sparsity, at the first cut


@dataclass(frozen=True)
class Cut:
    """One step of pruning: before which step of the training, to what, and the loss on the calibration batches."""

    step: int
    sparsity: float | str
    loss_before: float
    loss_after: float
    predicted_loss_increase: float


@dataclass(frozen=True, kw_only=True)
class GradualReport(Report):
    """Report of a gradual method; `losses` are those of each training step's batches, before the step."""

    verb: str = "prune_gradually"
    losses: tuple[float, ...]
    cuts: tuple[Cut, ...]


@torch.inference_mode(False)
@torch.enable_grad()
def prune_gradually(
    model: nn.Module,
    data: Any,
    training: Training,
    sparsity: float | str,
    *,
    loss_function: Loss | nn.Module | None = None,
    method: str = "gmp",
    options: Options | None = None,
    cuts: int = 10,
    first: float | None = None,
    rest: float = 0.3,
    layers: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    calibration: int = 16,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: Progress | None = None,
) -> Result[GradualReport]:
    """Prune the layers of `model`, in place, in several cuts with training between and after them.

    `method` is any row of `hesse methods` that makes zeros, with its `options`: at each cut its curvature is estimated
    anew on the first `calibration` batches, and its solver finds masks and weights; then the masks are held. With a
    teacher "gmp" is GMP* (Kurtic and Alistarh, 2022, arXiv:2210.06384), "gradual-obert" is gradual oBERT (Kurtic et
    al., 2022, arXiv:2203.07259). A row that prunes in one shot is run by the cubic schedule of both.

    There are `cuts` cuts; the first, before any training, prunes to the share of zeros `first` (0.7 of the final
    one), and the share `rest` of the steps comes after the last: a `GradualSchedule`. A pattern such as "2:4" is
    reached by way of 3:4. Unless `training.rate` is given, the learning rate is rewound at each cut. `layers` and
    `ignore` are patterns of layers' names, as in `compress`; data and checkpoints are as in `finetune`.

    Raises:
        HesseError: as `compress` and `finetune`; what does not fit is refused before any work is done.
    """
    pattern, options = parse_sparsity(sparsity), Options() if options is None else options
    share = share_of(pattern)
    kind = SCHEDULES.find(find_method(method, "compress", "prune_gradually").schedule or "cubic")
    schedule = kind(share, training.steps, cuts, FIRST * share if first is None else first, rest)
    rate = schedule.rate if training.rate is None else training.rate

    def recipe(amount: float | str) -> Recipe:
        return pruning_recipe(method, replace(options, sparsity=amount), layers, ignore)

    chosen = prunable(model, recipe(sparsity))
    objective = module_objective(model, data, loss_function, forward)
    for name in chosen:
        if name not in objective.named:
            raise OptionError(f"{name} is to be pruned but takes no gradient: set requires_grad, or ignore its layer")
    whole = {name: HeldZeros(torch.ones_like(objective.named[name], dtype=torch.bool)) for name in chosen}
    loop = TrainingLoop(objective, replace(training, rate=rate), whole)
    cutting = Cutting(loop, schedule, pattern, recipe, calibration)
    settings = f"{method} {sparsity} {options} {schedule} {layers} {ignore} {calibration}"
    kept = None if checkpoint is None else Checkpoints(checkpoint, checkpoint_every, loop, settings, cutting.note)
    if kept is not None and (note := kept.resume()):
        cutting.go_to(note)
    run_reported("prune gradually", loop, cutting.run, kept, progress)
    report = GradualReport(
        model=type(model).__name__, method=method, losses=tuple(loop.losses), cuts=tuple(cutting.cuts)
    )
    return Result(report, model)


class Cutting:
    """A training whose model is pruned a little more at each cut of a schedule, on the way to `pattern`.

    `recipe` gives what prunes to a share or a pattern; curvatures are of the first `calibration` batches.
    """

    def __init__(
        self,
        loop: TrainingLoop,
        schedule: GradualSchedule,
        pattern: Sparse,
        recipe: Callable[[float | str], Recipe],
        calibration: int,
    ) -> None:
        self.loop, self.schedule, self.pattern = loop, schedule, pattern
        self.recipe, self.calibration = recipe, calibration
        self.cuts: list[Cut] = []
        self.passed = 0  # cuts of the schedule, of which some may change nothing

    def run(self, after_step: Callable[[], None]) -> None:
        """Train and prune to the end."""
        for number, (step, share) in enumerate(zip(self.schedule.cut_steps, self.schedule.shares, strict=True)):
            if number < self.passed:
                continue
            self.loop.run(step, after_step)
            amount = format_sparsity(partial_pattern(self.pattern, share))
            if amount != 0.0 and (not self.cuts or amount != self.cuts[-1].sparsity):
                self._cut(amount)
            self.passed = number + 1
        self.loop.run(self.loop.training.steps, after_step)

    def _cut(self, amount: float | str) -> None:
        loop = self.loop
        objective = loop.objective
        result = compress_in_memory(
            objective.model,
            loop.first_batches(self.calibration),
            recipe=self.recipe(amount),
            loss_function=objective.loss,
            forward=objective.forward,
            seed=loop.training.seed + self.passed,
        )
        assert result.model is not None
        pruned, report = dict(result.model.named_parameters()), result.report
        weights = {name: pruned[name].detach() for name in loop.held}
        loop.restart_from(weights, {name: HeldZeros(weight != 0) for name, weight in weights.items()})
        changes = (report.loss_before, report.loss_after, report.predicted_loss_increase)
        self.cuts.append(Cut(loop.step, amount, *changes))

    def note(self) -> dict[str, Any]:
        """Return the state that a checkpoint saves in addition to the training's."""
        masks = {name: held.kept for name, held in self.loop.held.items() if isinstance(held, HeldZeros)}
        return {"passed": self.passed, "cuts": [asdict(cut) for cut in self.cuts], "masks": masks}

    def go_to(self, note: dict[str, Any]) -> None:
        """Restore the state that `note` returned; the training must be restored already."""
        self.passed, self.cuts = note["passed"], [Cut(**cut) for cut in note["cuts"]]
        masks: dict[str, Tensor] = note["masks"]
        self.loop.set_parametrizations({name: HeldZeros(mask.to(torch.bool)) for name, mask in masks.items()})


def format_sparsity(pattern: Sparse) -> float | str:
    """Return a pattern as the value of the option `sparsity`."""
    return pattern.amount if pattern.of is None else f"{int(pattern.amount)}:{pattern.of}"
