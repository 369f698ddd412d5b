"""What a structured pruning did."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hesse.curvature import Objective
from hesse.curvature.objective import differentiable_twice
from hesse.partitions.experts import with_linear_experts


@dataclass(frozen=True)
class StructuredReport:
    """Losses are of all batches, in the loss's unit; `removed` counts (gone, there were) by site.

    `predicted_loss_increase` is None for scores that are no losses. `difference` is that between the sliced model and
    the one with its groups zero, as a share of the largest output. `loading` says why transformers could not load the
    model; None if it can.
    """

    method: str
    removed: dict[str, tuple[int, int]]
    parameters: tuple[int, int]  # before, after
    flops: tuple[int, int]  # of a sample of the first batch, before and after
    loss: tuple[float, float]
    predicted_loss_increase: float | None
    difference: float
    loading: str | None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = ", ".join(f"{gone}/{there} {site}" for site, (gone, there) in self.removed.items() if gone)
        return (
            f"{self.method}: loss {self.loss[0]:.4f} → {self.loss[1]:.4f}, parameters {self.parameters[0]} → "
            f"{self.parameters[1]}, flops {self.flops[0]} → {self.flops[1]}; {parts or 'nothing'} gone"
        )


def parameters_of(model: nn.Module) -> int:
    """Entries of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_of(objective: Objective) -> int:
    """Floating-point operations of one sample of the first batch, forward; of experts, those of its own tokens."""
    inputs, targets = next(objective.batches())
    model, counter = with_linear_experts(objective.model), FlopCounterMode(display=False)
    with torch.no_grad(), differentiable_twice(), counter:  # where products of attention are seen
        objective.call(model, inputs)
    return int(counter.get_total_flops() // len(targets))
