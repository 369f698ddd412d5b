"""Report of an export, layer by layer."""

from collections import Counter
from dataclasses import dataclass

from hesse.result import Report


@dataclass(frozen=True)
class ExportedLayer:
    """Storage of a weight that the checkpoint holds as codes."""

    name: str
    grid: str  # in the checkpoint: bits, group and symmetry
    stored: str  # the target's type
    exact: bool  # codes, scales and zero points are unchanged
    scale_error: float = 0.0  # largest relative change of a scale
    offset_error: float = 0.0  # largest change of an offset, in steps of the grid


@dataclass(frozen=True)
class ExportedTensors:
    """Contents of the files that an exporter wrote."""

    layers: list[ExportedLayer]
    dense: dict[str, int]  # number of unquantised tensors by stored type
    tensors_checked: int  # read back and equal to what was to be written
    notes: list[str]  # every departure but those of single layers


@dataclass(frozen=True, kw_only=True)
class ExportReport(Report):
    """An export: the storage of each layer, and the differences from the checkpoint."""

    out: str
    bytes_before: int
    bytes_after: int
    target: str
    layers: list[ExportedLayer]  # of those that were stored as codes
    dense: dict[str, int]  # tensors that are not codes, by the type they are stored in
    tensors_checked: int  # read back and equal to what was to be written

    @property
    def stored(self) -> dict[str, int]:
        """Return the number of layers by the type that their codes are stored in."""
        return dict(Counter(layer.stored for layer in self.layers))

    @property
    def exact_layers(self) -> int:
        """Return the number of layers whose codes, scales and zero points are unchanged."""
        return sum(layer.exact for layer in self.layers)
