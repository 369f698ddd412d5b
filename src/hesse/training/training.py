"""Settings of a training: optimiser, steps, precision, and the teacher whose outputs are further targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hesse.curvature import CrossEntropy, Loss, SquaredError
from hesse.errors import OptionError

Named = Sequence[tuple[str, nn.Parameter]]


def adam(parameters: Named) -> torch.optim.Optimizer:
    """Return Adam with a learning rate of 0.0003, which rarely harms trained weights."""
    return torch.optim.Adam(parameters, lr=3e-4)


def linear_decay(step: int, steps: int) -> float:
    """Return a factor that decreases linearly from 1 at the first step to 0 after the last."""
    return 1 - step / steps


@dataclass(frozen=True)
class Distillation:
    """Loss (1 - share) · task + share · divergence from the teacher, term by term.

    For a cross-entropy the divergence is temperature² · KL(teacher || model) of both distributions at `temperature`;
    for a squared error it is the squared difference of the outputs, without a temperature. Masked positions are not
    counted in either term. Source: Hinton et al., 2015, arXiv:1503.02531.
    """

    share: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise OptionError(f"the share of distillation is {self.share}, but must be between 0 and 1")
        if not self.temperature > 0:
            raise OptionError(f"the temperature of distillation is {self.temperature}, but must be above 0; 2 is usual")

    def check(self, loss: Loss) -> None:
        """Check that the divergence for a loss is known.

        Raises:
            OptionError: the loss is neither a cross-entropy nor a squared error.
        """
        if not isinstance(loss, CrossEntropy | SquaredError):
            raise OptionError(
                f"there is no distillation for a {type(loss).__name__}: use CrossEntropy or SquaredError, or put the "
                "teacher into the loss function"
            )

    def terms(self, loss: Loss, outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each term, in the shape of the task loss's terms."""
        return (1 - self.share) * loss.terms(outputs, targets) + self.share * self._divergence(
            loss, outputs, teacher, targets
        )

    def _divergence(self, loss: Loss, outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        if not isinstance(loss, CrossEntropy):
            return (outputs - teacher).square()
        ours = (outputs / self.temperature).log_softmax(-1)
        theirs = (teacher / self.temperature).log_softmax(-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1) * self.temperature**2
        return divergence * (targets != loss.ignore_index)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training of `steps` optimiser steps, each on `accumulation` batches as one.

    - `optimizer` builds the optimiser from named tensors: `lambda named: torch.optim.AdamW(named, lr=1e-4)`.
    - `rate(step, steps)` is the factor of the learning rate at each step; by default it decreases linearly to 0, and
      restarts at each cut in gradual pruning.
    - `precision` is the type that the model computes in under autocast, such as torch.bfloat16; weights keep theirs.
    - `clip` bounds the norm of the gradient of all weights; None does not.
    - `teacher` is the dense model, or another with the same outputs, and `distillation` sets its weight in the loss.
    - `seed` determines all random numbers that torch draws during training.
    """

    steps: int
    optimizer: Callable[[Named], torch.optim.Optimizer] = adam
    rate: Callable[[int, int], float] | None = None
    accumulation: int = 1
    precision: torch.dtype | None = None
    clip: float | None = 1.0
    teacher: nn.Module | None = None
    distillation: Distillation = field(default_factory=Distillation)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulation < 1:
            raise OptionError(
                f"steps is {self.steps} and accumulation {self.accumulation}, but both must be at least 1"
            )
        if self.clip is not None and not self.clip > 0:
            raise OptionError(f"clip is {self.clip}, but must be above 0; None leaves gradients as they are")
        if self.precision not in (None, torch.bfloat16):
            raise OptionError(
                f"precision is {self.precision}, but must be None or torch.bfloat16: others need losses to be scaled"
            )

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resuming run must share, as plain values."""
        return {
            "steps": self.steps,
            "accumulation": self.accumulation,
            "precision": str(self.precision),
            "clip": self.clip,
            "distillation": None if self.teacher is None else [self.distillation.share, self.distillation.temperature],
            "seed": self.seed,
        }
