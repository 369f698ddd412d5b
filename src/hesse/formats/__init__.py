"""Checkpoint formats: layouts on disk that other programs load."""

from hesse.constraints import Grid, LowRank, SparseGrid
from hesse.errors import OptionError
from hesse.formats.base import DenseFormat, StoredLayer
from hesse.formats.floats import FloatFormat, MicroscaledFormat
from hesse.formats.low_rank import LowRankFormat
from hesse.formats.packed import IntegerFormat, PackedFormat
from hesse.formats.reading import CompressedCheckpoint, open_checkpoint, open_networks
from hesse.networks.network import CheckpointNetwork

FORMATS: dict[str, type[DenseFormat]] = {
    kind.name: kind
    for kind in (PackedFormat, IntegerFormat, FloatFormat, MicroscaledFormat, DenseFormat, LowRankFormat)
}

__all__ = [
    "FORMATS",
    "CompressedCheckpoint",
    "DenseFormat",
    "StoredLayer",
    "choose_format",
    "open_checkpoint",
    "open_networks",
]


def choose_format(requested: str, network: CheckpointNetwork, layers: list[StoredLayer]) -> DenseFormat:
    """Choose a format by name, or with `auto` the smallest one that loads: packed, low-rank or dense.

    With `auto`, layers of 8 bits with rounded inputs are stored as bytes, which take no more room than packed words and
    which runtimes multiply without unpacking.

    Raises:
        OptionError: there is no such format, or the format cannot store these layers.
    """
    constraints = [layer.constraint for layer in layers]
    if requested == "auto":
        if any(isinstance(c, LowRank) for c in constraints):
            requested = LowRankFormat.name
        elif any(isinstance(c, Grid | SparseGrid) for c in constraints):
            requested = IntegerFormat.name if _all_are_bytes(layers) else PackedFormat.name
        else:
            changed = [layer for layer in layers if layer.constraint is not None]
            floats = (kind for kind in (FloatFormat, MicroscaledFormat) if changed and all(map(kind.accepts, changed)))
            requested = next(floats, DenseFormat).name
    if requested not in FORMATS:
        raise OptionError(f"there is no format {requested!r}; there are auto, {', '.join(FORMATS)}")
    if requested in (PackedFormat.name, IntegerFormat.name):
        _check_packable(layers)
    if requested == LowRankFormat.name and not any(isinstance(c, LowRank) for c in constraints):
        raise OptionError("--format low-rank stores factorised layers, but no layer is factorised: use --format auto")
    rounded = next((layer.name for layer in layers if layer.input_bits is not None), None)
    if rounded is not None and not issubclass(FORMATS[requested], PackedFormat):
        raise OptionError(f"{rounded}: {requested} weights are loaded without rounding inputs: use --format auto")
    return FORMATS[requested](network, layers)


def _all_are_bytes(layers: list[StoredLayer]) -> bool:
    """True if every changed layer has codes of 8 bits and rounded inputs."""
    changed = [layer for layer in layers if layer.constraint is not None]
    grids = [c.grid if isinstance(c, SparseGrid) else c for c in (layer.constraint for layer in changed)]
    eight = all(isinstance(grid, Grid) and grid.bits == 8 for grid in grids)
    return eight and all(layer.input_bits is not None for layer in changed)


def _check_packable(layers: list[StoredLayer]) -> None:
    """Raise OptionError if a layer is factorised or no layer is quantised."""
    changed = [layer for layer in layers if layer.constraint is not None]
    quantised = any(isinstance(layer.constraint, Grid | SparseGrid) for layer in changed)
    for layer in changed:
        if isinstance(layer.constraint, LowRank) or not quantised:
            raise OptionError(
                f"{layer.name}: {PackedFormat.name} stores quantised layers, not {type(layer.constraint).__name__}; "
                "use --format auto"
            )
