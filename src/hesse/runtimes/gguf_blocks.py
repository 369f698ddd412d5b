"""Codes on our grids as the blocks of 32 weights that GGUF stores: the same integers, and each block's own scale."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hesse.constraints import Grid, GridCode
from hesse.errors import CheckpointError

BLOCK = 32  # weights that share a scale
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}  # of a block
LOWEST = {"Q4_0": -8, "Q5_0": -16, "Q8_0": -128}  # the codes of types without an offset, from here to -LOWEST - 1

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight in blocks, what it decodes to, and how far that is from the codes and scales it was made of."""

    stored: NDArray[np.uint8]  # (out, bytes of a row)
    weight: Floats  # (out, in): float16 scale · integer, and + float16 offset where there is one
    scale_error: float  # largest relative change of a scale on its way to float16; 0 if all are exact
    offset_error: float  # largest change of an offset on its way to float16, in steps of the grid; 0 if all are exact


def block_type(grid: Grid, columns: int) -> str | None:
    """The smallest GGUF type that holds every code of `grid` in a weight with `columns` columns.

    None if none does: blocks of 32 columns would straddle two scales, or differences of 8-bit codes and zero points
    need a ninth bit.
    """
    if columns % BLOCK or grid.group_width(columns) % BLOCK:
        return None
    if not grid.symmetric and grid.bits in (4, 5):
        return f"Q{grid.bits}_1"
    # An asymmetric grid of fewer bits is as exact without an offset: its codes less their zero points fit.
    lowest, highest = (grid.lowest, grid.highest) if grid.symmetric else (1 - 2**grid.bits, 2**grid.bits - 1)
    return next((name for name, low in LOWEST.items() if low <= lowest and highest < -low), None)


def to_blocks(grid: Grid, code: GridCode, type: str) -> Blocks:
    """A layer in the blocks of the GGUF type that `block_type` chose.

    Raises:
        CheckpointError: a scale is beyond what float16 can hold.
    """
    rows, columns = code.codes.shape
    per_group = code.scales.scale.numpy()
    scale, scale_error = _rounded_scales(per_group)
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
    per_block = columns // BLOCK
    scales = _per_column(scale, grid, columns)[:, ::BLOCK]
    offsets = None if offset is None else _per_column(offset, grid, columns)[:, ::BLOCK]
    blocks = codes.reshape(rows, per_block, BLOCK)
    weight = scales[..., None].astype(np.float32) * blocks.astype(np.float32)
    if offsets is not None:
        weight += offsets[..., None].astype(np.float32)
    if offset is None:
        blocks = blocks - LOWEST[type] if type != "Q8_0" else blocks
    parts = [_bytes(scales)] if offsets is None else [_bytes(scales), _bytes(offsets)]
    stored = np.concatenate([*parts, *_packed(blocks, type)], axis=-1)
    return Blocks(stored.reshape(rows, -1), weight.reshape(rows, columns), scale_error, offset_error)


def _rounded_scales(scale: Floats) -> tuple[NDArray[np.float16], float]:
    """Scales in float16, and the largest relative change."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise CheckpointError(f"a scale is {np.abs(scale).max():g}, and GGUF's float16 ends at 65504")
    return rounded, float(np.max(np.abs((rounded.astype(np.float64) - scale) / scale)))


def _per_column(per_group: NDArray[np.generic], grid: Grid, columns: int) -> NDArray[np.generic]:
    return np.repeat(per_group, grid.group_width(columns), axis=1)[:, :columns]


def _bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """A float16 of each block (out, blocks) as its two bytes (out, blocks, 2), little-endian."""
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8).reshape(*values.shape, 2)


def _packed(blocks: NDArray[np.int16], type: str) -> list[NDArray[np.uint8]]:
    """Codes (out, blocks, 32) as bytes: the fifth bits first; then low nibbles 0 to 15 beside high nibbles 16 to 31."""
    if type == "Q8_0":
        return [blocks.astype(np.int8).view(np.uint8)]
    codes = blocks.astype(np.uint8)
    nibbles = ((codes[..., :16] & 15) | ((codes[..., 16:] & 15) << 4)).astype(np.uint8)
    if type.startswith("Q4"):
        return [nibbles]
    return [np.packbits((codes >> 4).astype(np.uint8), axis=-1, bitorder="little"), nibbles]
