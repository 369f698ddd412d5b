"""What the tensors and the scheme of a quantised layer may say, checked before anything is decoded by it."""

import math
from pathlib import Path

import regex  # and not re, which cannot be stopped
import torch
from compressed_tensors.quantization import QuantizationScheme
from pydantic import ValidationError
from torch import Tensor

from hesse.errors import CheckpointError, reason

LONGEST_MATCH = 1.0  # seconds for a pattern and a name; patterns can be made to take years


def check_parts(parts: dict[str, Tensor], scheme: QuantizationScheme, packed: bool) -> torch.Size:
    """The shape of the weight that `parts` stand for, once they are seen to be of the sizes that it needs.

    The library would broadcast scales of other shapes, to any size, and unpack rows of other lengths, which its own
    older versions wrote for widths such as 3 bits, without a word.

    Raises:
        ValueError: they are not, or one is missing; the message ends a sentence that names the layer.
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
    """The shape that `stored` gives codes of so many `bits` in words of shape `words`.

    Raises:
        ValueError: it is not that of the words.
    """
    shape = stored.tolist()
    if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"a weight_shape of {str(shape)[:80]}, which is no shape")
    needed = [*shape[:-1], math.ceil(shape[-1] * bits / 32)]
    if list(words) != needed:
        raise ValueError(f"rows of {words[-1] if words else 0} words, where {bits} bits need {needed[-1]}")
    return torch.Size(shape)


def clamped(scheme: QuantizationScheme, shape: torch.Size) -> QuantizationScheme:
    """The scheme with blocks no larger than the weight: the library fills a weight up to whole blocks in memory."""
    structure = scheme.weights.block_structure
    if structure is None or len(shape) != 2:
        return scheme
    smaller = [min(block, size) for block, size in zip(structure, shape, strict=True)]
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update={"block_structure": smaller})})


def pattern_names(folder: Path, pattern: str, layer: str) -> bool:
    """Whether a regular expression of the config of the model in `folder` matches the beginning of a layer's name.

    Raises:
        CheckpointError: it is none, or takes for ever; the message quotes it.
    """
    try:
        return regex.match(pattern, layer, timeout=LONGEST_MATCH) is not None
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        why = f"is no regular expression ({reason(error)})"
    except TimeoutError:
        why = f"took more than {LONGEST_MATCH:g} seconds for one name"
    raise CheckpointError(f"{folder}/config.json has the target {pattern[:80]!r}, which {why}: correct it")


def one_line(error: Exception) -> str:
    """What an error says, on one line; pydantic's with each place."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
    return reason(error)
