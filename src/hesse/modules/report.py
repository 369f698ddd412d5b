"""The report of compressing a network in memory."""

from dataclasses import dataclass, field
from typing import Any

from hesse.networks.module_layers import some_of
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
