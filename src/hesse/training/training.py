"""Settings of a training: optimiser, steps, precision, teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hesse.errors import OptionError
from hesse.training.distillation import Distillation

Named = Sequence[tuple[str, nn.Parameter]]


def adam(parameters: Named) -> torch.optim.Optimizer:
    """Return Adam with a learning rate of 0.0003, which rarely harms trained weights."""
    return torch.optim.Adam(parameters, lr=3e-4)


def linear_decay(step: int, steps: int) -> float:
    """Return a factor that decreases linearly from 1 at the first step to 0 after the last."""
    return 1 - step / steps


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
