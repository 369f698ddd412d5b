"""Cuts of a gradual method: solve for masks and weights by a rule of the table, and keep the zeros from then on."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.constraints import Sparse
from hesse.methods import Recipe
from hesse.training.held import HeldZeros
from hesse.training.loop import TrainingLoop
from hesse.training.movement import partial_pattern
from hesse.training.schedules import GradualSchedule


@dataclass(frozen=True)
class Cut:
    """One step of pruning: before which step of the training, to what, and the loss on the calibration batches."""

    step: int
    sparsity: float | str
    loss_before: float
    loss_after: float
    predicted_loss_increase: float


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
        from hesse.modules.compress import compress_in_memory

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
