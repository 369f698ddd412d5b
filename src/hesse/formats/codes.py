"""Integer codes and scales of a stored layer, read without decoding, for runtimes that use them directly."""

from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.constraints import Grid, GridCode
from hesse.constraints.grouped import Scales
from hesse.errors import CheckpointError, reason
from hesse.formats.packed import IntegerFormat, PackedFormat
from hesse.formats.reading import CompressedCheckpoint


def stored_grid(checkpoint: Checkpoint, layer: str) -> Grid | None:
    """Return the grid of a stored weight, with the type of its scales; None if it is not stored on a grid."""
    if not isinstance(checkpoint, CompressedCheckpoint) or not checkpoint.is_quantised(layer):
        return None
    format, scheme = checkpoint.scheme(layer)
    arguments = scheme.weights
    bytes_each = format == IntegerFormat.name and arguments is not None and arguments.symmetric
    if not (format == PackedFormat.name or bytes_each) or arguments is None or arguments.type != "int":
        return None
    group_size = -1 if (width := _group_width(arguments)) is None else width
    dtype = checkpoint.dtype(f"{layer}.weight_scale")
    if not dtype.is_floating_point:
        raise CheckpointError(f"{checkpoint.folder}: the scales of {layer} are {dtype}: copy the folder again")
    return Grid(arguments.num_bits, group_size, bool(arguments.symmetric), dtype=dtype)


def read_grid_code(checkpoint: Checkpoint, layer: str) -> GridCode:
    """Read the codes (out, in), scales and zero points (out, groups) of a layer that has a `stored_grid`.

    Raises:
        CheckpointError: a tensor is missing, or shapes do not match.
    """
    grid = stored_grid(checkpoint, layer)
    assert grid is not None and isinstance(checkpoint, CompressedCheckpoint)
    packed = f"{layer}.weight_packed" in checkpoint.shard_of
    parts = [
        "weight_packed" if packed else "weight",
        "weight_scale",
        *([] if grid.symmetric else ["weight_zero_point"]),
    ]
    stored = checkpoint.read_stored([f"{layer}.{part}" for part in parts])
    codes, scale = (stored[f"{layer}.{part}"] for part in parts[:2])
    arguments = checkpoint.scheme(layer)[1].weights
    try:
        codes = unpack_from_int32(codes, grid.bits, checkpoint.code_shape(layer)) if packed else codes
        zero_point = None if grid.symmetric else _zero_point(stored[f"{layer}.weight_zero_point"], arguments, scale)
    except (IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: the codes of {layer} cannot be unpacked ({reason(error)})"
        ) from None
    if _along_columns(arguments):
        codes, scale = codes.T.contiguous(), scale.T.contiguous()
        zero_point = None if zero_point is None else zero_point.T.contiguous()
    if codes.ndim != 2 or scale.shape != (codes.shape[0], grid.groups(codes.shape[1])):
        raise CheckpointError(
            f"{checkpoint.folder}: {layer} has scales of shape {tuple(scale.shape)} for codes of shape "
            f"{tuple(codes.shape)} in groups of {grid.group_size}: copy the folder again"
        )
    return GridCode(codes, Scales(scale.float(), None if zero_point is None else zero_point.float()))


def is_transposed(checkpoint: Checkpoint, layer: str) -> bool:
    """True if the codes of a layer that has a `stored_grid` are (in, out) on disk."""
    assert isinstance(checkpoint, CompressedCheckpoint)
    return _along_columns(checkpoint.scheme(layer)[1].weights)


def _zero_point(stored: Tensor, arguments: QuantizationArgs, scale: Tensor) -> Tensor:
    """Return the zero points in the shape of `scale`: unpacked along the rows, or as stored for the block strategy."""
    if arguments.strategy == "block":
        return stored
    unpacked: Tensor = unpack_from_int32(stored, arguments.num_bits, scale.shape, packed_dim=0)
    return unpacked


def _group_width(arguments: QuantizationArgs) -> int | None:
    """Return the number of columns that share a scale; None for whole rows."""
    if arguments.strategy == "block":
        return int(max(arguments.block_structure))
    return None if arguments.group_size is None else int(arguments.group_size)


def _along_columns(arguments: QuantizationArgs) -> bool:
    """True if the file holds (in, out), so that groups run down its columns."""
    return bool(arguments.strategy == "block" and arguments.block_structure[0] > 1)
