"""What compressing a module did and what it cost."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from hesse.compression.report import LayerReport

NOT_WRITTEN = ("module", "encoded")


@dataclass(frozen=True, eq=False)
class ModuleReport:
    """The changed module, and the account of it. Losses are in the loss's own unit, a term: nats for cross-entropy."""

    module: nn.Module  # a changed copy, in eval mode
    method: str
    loss_before: float  # on the data that the layers were solved on
    loss_after: float  # measured on the same data
    predicted_loss_increase: float  # the sum of the layers' own
    bits_per_weight: float  # over the compressed layers, as their constraints count scales, masks and factors
    layers: list[LayerReport]
    notes: list[str]  # layers that were left alone, and departures from what was asked
    recipe: dict[str, Any]
    encoded: dict[str, Any]  # by layer: codes and scales, mask and values, or factors, as the constraint stores them

    @property
    def measured_loss_increase(self) -> float:
        """What the change cost on the data that the layers were solved on."""
        return self.loss_after - self.loss_before

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, without the module and the stored forms."""
        names = [field.name for field in fields(self) if field.name not in NOT_WRITTEN]
        content = {name: getattr(self, name) for name in names if name != "layers"}
        return {**content, "layers": [asdict(layer) for layer in self.layers]}
