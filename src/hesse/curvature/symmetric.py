"""Symmetric products with little more than half of the work."""

import torch
from torch import Tensor

LEAF = 128  # columns; below this a product is too small to run at full rate


def add_upper(total: Tensor, flat: Tensor) -> None:
    """Add flatᵀ flat (in, in) of `flat` (tokens, in) to `total`, at least on and above its diagonal.

    Halves are split again until they are narrow: large products throughout, and little more than half of the work.
    `flat` is of the type of `total`, or one that `multiplies_exactly`.
    """
    columns = flat.shape[1]
    if columns <= LEAF:
        _add_product(total, flat, flat)
        return
    middle = columns // 2
    add_upper(total[:middle, :middle], flat[:, :middle])
    add_upper(total[middle:, middle:], flat[:, middle:])
    _add_product(total[:middle, middle:], flat[:, :middle], flat[:, middle:])


def multiplies_exactly(flat: Tensor) -> bool:
    """Return True if a product of this type is a float32 sum of exact products: 16 bits, on a GPU."""
    return flat.device.type == "cuda" and flat.dtype in (torch.bfloat16, torch.float16)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += torch.mm(left.T, right, out_dtype=total.dtype)


def row_products(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return r M rᵀ of each row r of `rows` (..., n) for a symmetric `matrix` M (n, n), as (...,).

    Only the part of M on and above its diagonal is read.
    """
    flat = rows.reshape(-1, len(matrix))
    total, images = flat.new_zeros(len(flat)), flat.new_empty(len(flat), min(LEAF, len(matrix)))
    for start in range(0, len(matrix), LEAF):
        stop = min(start + LEAF, len(matrix))
        strip, image = flat[:, start:stop], images[:, : stop - start]
        torch.mm(strip, matrix[start:stop, start:stop], out=image)
        image.addmm_(flat[:, :start], matrix[:start, start:stop], alpha=2)
        total += torch.linalg.vecdot(image, strip)
    return total.view(rows.shape[:-1])


def mirror(upper: Tensor) -> None:
    """Copy the upper triangle of `upper` (n, n) onto the lower one, a few rows at a time."""
    for start in range(0, len(upper), LEAF):
        rows = slice(start, start + LEAF)
        block = upper[rows, rows].triu()
        upper[rows, rows] = block + block.triu(1).T
        upper[start + LEAF :, rows] = upper[rows, start + LEAF :].T


def symmetric_from_upper(upper: Tensor) -> Tensor:
    """Return the symmetric matrix with the upper triangle of `upper`."""
    result = upper.clone()
    mirror(result)
    return result
