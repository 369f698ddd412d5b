"""How a network is trained: optimiser, steps, precision, teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hesse.errors import OptionError
from hesse.training.distillation import Distillation

Named = Sequence[tuple[str, nn.Parameter]]


def adam(parameters: Named) -> torch.optim.Optimizer:
    """Adam at a rate of 0.0003, which seldom harms trained weights."""
    return torch.optim.Adam(parameters, lr=3e-4)


def linear_decay(step: int, steps: int) -> float:
    """From 1 at the first step down to 0 after the last."""
    return 1 - step / steps


@dataclass(frozen=True, kw_only=True)
class Training:
    """`steps` of an optimiser, each on `accumulation` batches as if they were one.

    - `optimizer` makes it from the names and tensors to train: `lambda named: torch.optim.AdamW(named, lr=1e-4)`.
    - `rate(step, steps)` is what the learning rate is multiplied by at each step; by default it falls linearly to 0,
      and in gradual pruning it begins again at each cut.
    - `precision` is what the model computes in under autocast, such as torch.bfloat16; weights stay as they are.
    - `clip` bounds the norm of the gradient of all weights; None for none.
    - `teacher` is the dense model, or another with the same outputs, and `distillation` how it counts.
    - `seed` decides all random numbers that torch draws on the way.
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
        """What of it another run must share to go on with this one's work, as plain values."""
        return {
            "steps": self.steps,
            "accumulation": self.accumulation,
            "precision": str(self.precision),
            "clip": self.clip,
            "distillation": None if self.teacher is None else [self.distillation.share, self.distillation.temperature],
            "seed": self.seed,
        }
