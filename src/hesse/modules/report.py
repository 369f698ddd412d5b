"""The reports of compressing and of pruning a network in memory."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hesse.curvature import Objective
from hesse.curvature.objective import differentiable_twice
from hesse.networks.module_layers import some_of
from hesse.partitions.experts import with_linear_experts
from hesse.result import NOT_WRITTEN, Report


@dataclass(frozen=True, kw_only=True)
class ModuleReport(Report):
    """Report of compressing a module. Losses are in the loss's own unit per term: nats for cross-entropy.

    `encoded` has for each layer codes and scales, mask and values, or factors, as the constraint stores them.
    """

    verb: str = "compress"
    loss_before: float  # on the data that `loss` was measured on
    loss_after: float
    predicted_loss_increase: float  # the sum of the layers' own
    bits_per_weight: float  # over the compressed layers, as their constraints count scales, masks and factors
    recipe: dict[str, Any]
    encoded: dict[str, Any] = field(metadata=NOT_WRITTEN, repr=False)

    @property
    def measured_loss_increase(self) -> float:
        """Return the loss after minus the loss before."""
        return self.loss_after - self.loss_before

    def __str__(self) -> str:
        names = some_of([layer.name for layer in self.layers])
        notes = "".join(f"\n  {note}" for note in self.notes)
        return (
            f"{self.method}: {self.bits_per_weight:.2f} bits a weight, loss {self.loss_before:.4f} → "
            f"{self.loss_after:.4f} ({self.predicted_loss_increase:+.4f} predicted), {names}{notes}"
        )


@dataclass(frozen=True, kw_only=True)
class PruneReport(Report):
    """Report of pruning. Losses are over all batches, in the loss's unit; `loss.measured` is their difference.

    `removed` counts (removed, there were) by site: groups of a layer, dimensions of a head, or weights of a layer.
    `settings` are the options of the method. `loss.predicted` is None for scores that are no losses.

    Of parts that are cut out, `flops_before` and `flops_after` are of a sample of the first batch, `difference` is that
    between the outputs of the smaller network and of the one with its groups at zero, as a share of the largest output,
    and `loading` is the reason why transformers cannot load the network; None if it can. Of single weights, `encoded`
    has each layer's mask and values.
    """

    verb: str = "prune"
    what: str
    removed: dict[str, tuple[int, int]]
    loss_before: float
    loss_after: float
    settings: dict[str, Any]
    flops_before: int | None = None
    flops_after: int | None = None
    difference: float | None = None
    loading: str | None = None
    bits_per_weight: float | None = None
    encoded: dict[str, Any] = field(default_factory=dict, metadata=NOT_WRITTEN, repr=False)

    def __str__(self) -> str:
        parts = ", ".join(f"{removed}/{there} {site}" for site, (removed, there) in self.removed.items() if removed)
        predicted = self.loss.predicted if self.loss is not None else None
        prediction = "" if predicted is None else f" ({predicted:+.4f} predicted)"
        sizes = (
            ""
            if self.flops_before is None
            else (
                f", parameters {self.parameters_before} → {self.parameters_after}, flops {self.flops_before} → "
                f"{self.flops_after}"
            )
        )
        notes = "".join(f"\n  {note}" for note in self.notes)
        return (
            f"{self.method}: loss {self.loss_before:.4f} → {self.loss_after:.4f}{prediction}{sizes}; "
            f"{parts or 'nothing'} removed{notes}"
        )


def flops_of(objective: Objective) -> int:
    """Return the floating-point operations of one sample of the first batch, forward; of experts, its own tokens'."""
    inputs, targets = next(objective.batches())
    model, counter = with_linear_experts(objective.model), FlopCounterMode(display=False)
    with torch.no_grad(), differentiable_twice(), counter:  # where products of attention are seen
        objective.call(model, inputs)
    return int(counter.get_total_flops() // len(targets))
