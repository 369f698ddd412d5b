"""What an export did, layer by layer."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ExportedLayer:
    """A weight that was stored as codes, and what became of it."""

    name: str
    grid: str  # as it was: bits, group and symmetry
    stored: str  # the target's type
    exact: bool  # codes, scales and zero points are what they were
    scale_error: float = 0.0  # largest relative change of a scale
    offset_error: float = 0.0  # largest change of an offset, in steps of the grid


@dataclass(frozen=True)
class Written:
    """What an exporter put into its files."""

    layers: list[ExportedLayer]
    dense: dict[str, int]  # tensors that were not codes, by the type they are stored in
    tensors_checked: int  # that were read back and equal what was to be written
    notes: list[str]  # every departure but those of single layers


@dataclass(frozen=True)
class ExportReport:
    """An export: what was stored how, and what departs from the checkpoint."""

    model: str
    out: str
    target: str
    bytes: int
    bytes_before: int
    seconds: float
    layers: list[ExportedLayer]  # of those that were stored as codes
    dense: dict[str, int]  # tensors that are not codes, by the type they are stored in
    tensors_checked: int  # that were read back and equal what was to be written
    notes: list[str]  # every departure
    versions: dict[str, str]

    @property
    def stored(self) -> dict[str, int]:
        """Number of layers by the type that their codes are stored in."""
        return dict(Counter(layer.stored for layer in self.layers))

    @property
    def exact_layers(self) -> int:
        """Layers whose codes, scales and zero points are what they were."""
        return sum(layer.exact for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)
