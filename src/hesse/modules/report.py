"""What compressing a module did and what it cost."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from hesse.layerwise.report import LayerReport
from hesse.networks.module_layers import some_of

NOT_WRITTEN = ("module", "encoded")


@dataclass(frozen=True, eq=False)
class ModuleReport:
    """The changed module, and the account of it. Losses are in the loss's own unit, a term: nats for cross-entropy."""

    module: nn.Module = field(repr=False)  # a changed copy, in eval mode
    method: str
    loss_before: float  # on the data that the layers were solved on
    loss_after: float  # measured on the same data
    predicted_loss_increase: float  # the sum of the layers' own
    bits_per_weight: float  # over the compressed layers, as their constraints count scales, masks and factors
    layers: list[LayerReport]
    notes: list[str]  # layers that were left alone, and departures from what was asked
    recipe: dict[str, Any]
    encoded: dict[str, Any] = field(
        repr=False
    )  # by layer: codes and scales, mask and values, or factors, as the constraint stores them

    @property
    def measured_loss_increase(self) -> float:
        """What the change cost on the data that the layers were solved on."""
        return self.loss_after - self.loss_before

    def __str__(self) -> str:
        names = some_of([layer.name for layer in self.layers])
        notes = "".join(f"\n  {note}" for note in self.notes)
        return (
            f"{self.method}: {self.bits_per_weight:.2f} bits a weight, loss {self.loss_before:.4f} → "
            f"{self.loss_after:.4f} ({self.predicted_loss_increase:+.4f} predicted), {names}{notes}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, without the module and the stored forms."""
        names = [field.name for field in fields(self) if field.name not in NOT_WRITTEN]
        content = {name: getattr(self, name) for name in names if name != "layers"}
        return {**content, "layers": [asdict(layer) for layer in self.layers]}
