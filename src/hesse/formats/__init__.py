"""Writing and reading what other programs load."""

from hesse.constraints import Grid, LowRank, SparseGrid
from hesse.errors import OptionError
from hesse.formats.base import Format, StoredLayer
from hesse.formats.dense import DenseFormat
from hesse.formats.low_rank import LowRankFormat
from hesse.formats.packed import PackedFormat
from hesse.formats.reading import CompressedCheckpoint, open_checkpoint
from hesse.models.network import Network

FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (PackedFormat, DenseFormat, LowRankFormat)}

__all__ = ["FORMATS", "CompressedCheckpoint", "Format", "StoredLayer", "choose_format", "open_checkpoint"]


def choose_format(requested: str, network: Network, layers: list[StoredLayer]) -> Format:
    """The format of that name, or with `auto` the smallest that loads: packed, low-rank, or dense.

    Raises:
        OptionError: there is no such format, or it cannot store these layers.
    """
    constraints = [layer.constraint for layer in layers]
    if requested == "auto":
        if any(isinstance(c, LowRank) for c in constraints):
            requested = LowRankFormat.name
        elif any(isinstance(c, Grid | SparseGrid) for c in constraints):
            requested = PackedFormat.name
        else:
            requested = DenseFormat.name
    if requested not in FORMATS:
        raise OptionError(f"there is no format {requested!r}; there are auto, {', '.join(FORMATS)}")
    if requested == PackedFormat.name:
        _check_packable(layers)
    if requested == LowRankFormat.name and not any(isinstance(c, LowRank) for c in constraints):
        raise OptionError("--format low-rank stores factorised layers, and there are none: use --format auto")
    return FORMATS[requested](network, layers)


def _check_packable(layers: list[StoredLayer]) -> None:
    """Raise OptionError if a layer is factorised, or none is quantised."""
    changed = [layer for layer in layers if layer.constraint is not None]
    quantised = any(isinstance(layer.constraint, Grid | SparseGrid) for layer in changed)
    for layer in changed:
        if isinstance(layer.constraint, LowRank) or not quantised:
            raise OptionError(
                f"{layer.name}: {PackedFormat.name} stores quantised layers, not {type(layer.constraint).__name__}; "
                "use --format auto"
            )
