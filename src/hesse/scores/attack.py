"""Inputs that an attacker moved: projected gradient descent (Madry et al., 2018)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.curvature import Objective
from hesse.curvature.objective import Batch
from hesse.errors import OptionError


@dataclass(frozen=True)
class Attack:
    """`steps` of `rate` times the sign of the loss's gradient, each brought back to within `radius` of the input.

    In the inputs' units and in the largest entry; inputs stay between `lowest` and `highest`. It starts at the input
    itself, so it is the same each time.
    """

    radius: float
    steps: int = 10
    rate: float | None = None  # None for 2.5 radius / steps
    lowest: float = float("-inf")
    highest: float = float("inf")

    def __post_init__(self) -> None:
        if not (self.radius > 0 and self.steps >= 1):
            raise OptionError("an attack needs a radius above 0 and 1 step or more")

    def on(self, objective: Objective) -> list[Batch]:
        """All batches of an objective, attacked."""
        return [(self.inputs(objective, inputs, targets), targets) for inputs, targets in objective.batches()]

    def inputs(self, objective: Objective, inputs: Any, targets: Tensor) -> Tensor:
        """The moved inputs of one batch (samples, ...).

        Raises:
            OptionError: the inputs are not one tensor of floating-point numbers.
        """
        if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
            raise OptionError("an attack moves inputs that are one tensor of floating-point numbers, such as images")
        rate = 2.5 * self.radius / self.steps if self.rate is None else self.rate
        moved = inputs.detach().clone()
        for _ in range(self.steps):
            moved.requires_grad_()
            with torch.enable_grad():
                loss = objective.loss.terms(objective.outputs_once(moved), targets).sum()
            (slope,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + rate * slope.sign()
            moved = (inputs + (moved - inputs).clamp(-self.radius, self.radius)).clamp(self.lowest, self.highest)
        return moved
