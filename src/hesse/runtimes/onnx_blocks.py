"""Pack codes as the inputs of MatMulNBits, onnxruntime's product with 4-bit or 8-bit weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Grid, GridCode

SMALLEST, LARGEST = 16, 256  # columns of a block: powers of two between these


@dataclass(frozen=True, eq=False)
class NBits:
    """The constants of one MatMulNBits: weight = (codes - zero point) · scale, block by block."""

    bits: int
    block: int  # columns
    codes: Tensor  # (out, blocks, bytes of a block) uint8; with 4 bits two codes a byte, the first in the low half
    scales: Tensor  # (out, blocks) float32
    zero_points: Tensor | None  # (out, bytes of a row's blocks) uint8, packed the same way; None: half of the range


def block_width(grid: Grid, columns: int) -> int | None:
    """Return the widest block that never straddles two scales; None if onnxruntime has no block so narrow."""
    width = grid.group_width(columns)
    if width == columns:
        return next((block for block in (LARGEST, 128, 64) if columns % block == 0), 32)  # the last block may be padded
    block = min(width & -width, LARGEST)
    return block if block >= SMALLEST else None


def stored_bits(grid: Grid) -> int:
    """Return the bits per code, 4 or 8: the smaller that holds every code."""
    return 4 if grid.bits <= 4 else 8


def to_nbits(grid: Grid, code: GridCode, block: int) -> NBits:
    """Return a layer with exactly its codes, scales and zero points; each scale is repeated for its group's blocks."""
    rows, columns = code.codes.shape
    bits = stored_bits(grid)
    middle = 1 << (bits - 1)
    padding = -columns % block
    codes = torch.nn.functional.pad(code.codes.to(torch.int16), (0, padding)) + middle
    stored = _to_bytes(codes.to(torch.uint8), bits).view(rows, -1, block * bits // 8)
    scales = grid.expand(code.scales.scale, columns)[:, ::block].contiguous()
    zero_points = None
    if code.scales.zero_point is not None:
        per_block = grid.expand(code.scales.zero_point, columns)[:, ::block].to(torch.int16) + middle
        zero_points = _to_bytes(torch.nn.functional.pad(per_block, (0, per_block.shape[1] % 2)).to(torch.uint8), bits)
        zero_points = zero_points[:, : -(-per_block.shape[1] * bits // 8)].contiguous()
    return NBits(bits, block, stored, scales, zero_points)


def _to_bytes(values: Tensor, bits: int) -> Tensor:
    """Return the bytes (out, n · bits / 8) of numbers (out, n) of 4 or 8 bits; n is even."""
    return values.contiguous() if bits == 8 else values[:, ::2] | (values[:, 1::2] << 4)
