"""Pack codes into GGUF's blocks of 32 weights: the same integers, with one scale per block."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hesse.constraints import Grid, GridCode
from hesse.errors import CheckpointError

BLOCK_WEIGHTS = 32  # weights that share a scale
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}  # of a block
LOWEST = {"Q4_0": -8, "Q5_0": -16, "Q8_0": -128}  # codes of types without an offset range from here to -LOWEST - 1

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class GGUFBlocks:
    """A weight in blocks, its decoded values, and the rounding errors of its scales and offsets."""

    stored: NDArray[np.uint8]  # (out, bytes of a row)
    weight: FloatArray  # (out, in): float16 scale · integer, plus the float16 offset of types that have one
    scale_error: float  # largest relative change of a scale in float16; 0 if all are exact
    offset_error: float  # largest change of an offset in float16, in steps of the grid; 0 if all are exact


def block_type(grid: Grid, columns: int) -> str | None:
    """Return the smallest GGUF type that holds every code of `grid` in a weight with `columns` columns.

    None if no type does: blocks of 32 columns would straddle two scales, or differences of 8-bit codes and zero points
    need a ninth bit.
    """
    if columns % BLOCK_WEIGHTS or grid.group_width(columns) % BLOCK_WEIGHTS:
        return None
    if not grid.symmetric and grid.bits in (4, 5):
        return f"Q{grid.bits}_1"
    # An asymmetric grid of fewer bits needs no offset: codes minus zero points fit the integers.
    lowest, highest = (grid.lowest, grid.highest) if grid.symmetric else (1 - 2**grid.bits, 2**grid.bits - 1)
    return next((name for name, low in LOWEST.items() if low <= lowest and highest < -low), None)


def to_blocks(grid: Grid, code: GridCode, type: str) -> GGUFBlocks:
    """Return a layer in blocks of the GGUF type that `block_type` chose.

    Raises:
        CheckpointError: a scale overflows float16.
    """
    rows, columns = code.codes.shape
    per_group = code.scales.scale.numpy()
    scale, scale_error = _half_scales(per_group)
    codes = code.codes.to(torch.int16).numpy()
    zero_point = code.scales.zero_point
    offset_error = 0.0
    offset: NDArray[np.float16] | None = None
    if type.endswith("_1"):
        assert zero_point is not None
        exact = -(zero_point.numpy().astype(np.float64) - grid.lowest) * per_group
        offset = exact.astype(np.float16)
        offset_error = float(np.max(np.abs(offset.astype(np.float64) - exact) / per_group))
        codes = codes - grid.lowest
    elif zero_point is not None:
        codes = codes - _per_column(zero_point.numpy().astype(np.int16), grid, columns)
    per_block = columns // BLOCK_WEIGHTS
    scales = _per_column(scale, grid, columns)[:, ::BLOCK_WEIGHTS]
    blocks = codes.reshape(rows, per_block, BLOCK_WEIGHTS)
    weight = scales[..., None].astype(np.float32) * blocks.astype(np.float32)
    parts = [_bytes(scales)]
    if offset is not None:
        offsets = _per_column(offset, grid, columns)[:, ::BLOCK_WEIGHTS]
        weight += offsets[..., None].astype(np.float32)
        parts.append(_bytes(offsets))
    elif type != "Q8_0":
        blocks = blocks - LOWEST[type]
    stored = np.concatenate([*parts, *_code_bytes(blocks, type)], axis=-1)
    return GGUFBlocks(stored.reshape(rows, -1), weight.reshape(rows, columns), scale_error, offset_error)


def _half_scales(scale: FloatArray) -> tuple[NDArray[np.float16], float]:
    """Return the scales in float16, and the largest relative change."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise CheckpointError(f"a scale is {np.abs(scale).max():g}, but GGUF's float16 ends at 65504")
    return rounded, float(np.max(np.abs((rounded.astype(np.float64) - scale) / scale)))


def _per_column(per_group: NDArray[np.generic], grid: Grid, columns: int) -> NDArray[np.generic]:
    return np.repeat(per_group, grid.group_width(columns), axis=1)[:, :columns]


def _bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return the bytes (out, blocks, 2), little-endian, of one float16 per block (out, blocks)."""
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8).reshape(*values.shape, 2)


def _code_bytes(blocks: NDArray[np.int16], type: str) -> list[NDArray[np.uint8]]:
    """Return the bytes of codes (out, blocks, 32): the fifth bits; then codes 0-15 low and 16-31 high in each byte."""
    if type == "Q8_0":
        return [blocks.astype(np.int8).view(np.uint8)]
    codes = blocks.astype(np.uint8)
    nibbles = ((codes[..., :16] & 15) | ((codes[..., 16:] & 15) << 4)).astype(np.uint8)
    if type.startswith("Q4"):
        return [nibbles]
    return [np.packbits((codes >> 4).astype(np.uint8), axis=-1, bitorder="little"), nibbles]
