"""Checks of a quantised layer's tensors and scheme, made before anything is decoded."""

import math
from pathlib import Path

import regex  # re has no timeout
import torch
from compressed_tensors.quantization import QuantizationScheme
from pydantic import ValidationError
from torch import Tensor

from hesse.errors import CheckpointError, reason

LONGEST_MATCH = 1.0  # seconds for one pattern and one name: a hostile pattern can take years


def check_parts(parts: dict[str, Tensor], scheme: QuantizationScheme, packed: bool) -> torch.Size:
    """Check the sizes of a layer's stored `parts` and return the shape of its weight.

    The library itself broadcasts scales of other shapes, to any size, without an error. It also unpacks rows of other
    lengths, which its older versions wrote for widths such as 3 bits.

    Raises:
        ValueError: a size does not fit, or a part is missing; the message completes a sentence that names the layer.
    """
    if scheme.weights is None:
        raise ValueError("no scheme for weights")
    codes = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    if packed:
        shape = packed_shape(codes.shape, parts["weight_shape"], scheme.weights.num_bits)
    else:
        shape = torch.Size((*codes.shape[:-1], 2 * codes.shape[-1])) if "weight_packed" in parts else codes.shape
    for name in ("weight_scale", "weight_zero_point"):
        part = parts.get(name)
        if part is None:
            continue
        ends = zip(reversed(part.shape), reversed(shape), strict=False)
        if part.ndim > len(shape) or any(size > bound for size, bound in ends):
            raise ValueError(f"{name} of shape {tuple(part.shape)} for a weight of shape {tuple(shape)}")
    return shape


def packed_shape(words: torch.Size, stored: Tensor, bits: int) -> torch.Size:
    """Return the shape of codes of `bits` bits that are packed in words of shape `words`; `stored` declares that shape.

    Raises:
        ValueError: the declared shape does not fit the words.
    """
    shape = stored.tolist()
    if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"a weight_shape of {str(shape)[:80]}, which is not a shape")
    needed = [*shape[:-1], math.ceil(shape[-1] * bits / 32)]
    if list(words) != needed:
        raise ValueError(f"rows of {words[-1] if words else 0} words, but {bits} bits need {needed[-1]}")
    return torch.Size(shape)


def limit_blocks(scheme: QuantizationScheme, shape: torch.Size) -> QuantizationScheme:
    """Return the scheme with blocks no larger than the weight: the library pads a weight to whole blocks in memory."""
    structure = scheme.weights.block_structure
    if structure is None or len(shape) != 2:
        return scheme
    smaller = [min(block, size) for block, size in zip(structure, shape, strict=True)]
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update={"block_structure": smaller})})


def pattern_matches(folder: Path, pattern: str, layer: str) -> bool:
    """True if a regular expression from the config of the model in `folder` matches the start of a layer's name.

    Raises:
        CheckpointError: the pattern is invalid, or takes too long; the message quotes it.
    """
    try:
        return regex.match(pattern, layer, timeout=LONGEST_MATCH) is not None
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        why = f"is not a valid regular expression ({reason(error)})"
    except TimeoutError:
        why = f"took more than {LONGEST_MATCH:g} seconds for one name"
    raise CheckpointError(f"{folder}/config.json has the target {pattern[:80]!r}, which {why}: correct it")


def one_line(error: Exception) -> str:
    """Return an error's message on one line; a pydantic error's with the place of each part."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
    return reason(error)
