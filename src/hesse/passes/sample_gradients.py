"""Gradients of single samples, from the recorded batches of a pass."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hesse.passes.parts import ParameterPart
from hesse.passes.recorded_batch import RecordedBatch, Rows

TOGETHER = 1 << 26  # bytes of one parameter's gradients in one step


def sample_gradients(
    passage: RecordedBatch, name: str, parts: list[ParameterPart], parameter: Tensor
) -> Iterator[Tensor]:
    """Yield the gradients (samples, *shape) of a parameter, a few samples at a time; nothing if no sample used it."""
    if name in passage.others:
        yield passage.others[name]
        return
    found = [(part, rows) for part in parts if (rows := passage.rows(part)) is not None]
    if not found:
        return
    samples, step = len(found[0][1].gradients), max(TOGETHER // (parameter.numel() * parameter.element_size()), 1)
    for start in range(0, samples, step):
        some = slice(start, start + step)
        flat = torch.stack([_gradients(part, rows, some, parameter).flatten(1) for part, rows in found]).sum(0)
        yield flat.view(-1, *parameter.shape)


def flat_gradients(
    passage: RecordedBatch, parts: dict[str, list[ParameterPart]], parameters: Mapping[str, Tensor]
) -> Tensor:
    """Return the gradients of all parameters, concatenated, as (samples, entries)."""
    flat = []
    for name, parameter in parameters.items():
        found = [gradients.flatten(1) for gradients in sample_gradients(passage, name, parts[name], parameter)]
        flat.append(torch.cat(found) if found else parameter.new_zeros(passage.samples, parameter.numel()))
    return torch.cat(flat, dim=1)


def summed_gradient(passage: RecordedBatch, parts: list[ParameterPart], parameter: Tensor) -> Tensor:
    """Return the gradient (*shape) summed over all samples."""
    total = torch.zeros_like(parameter)
    for gradients in sample_gradients(passage, "", parts, parameter):
        total += gradients.sum(0)
    return total


def _gradients(part: ParameterPart, rows: Rows, some: slice, parameter: Tensor) -> Tensor:
    """Return the contribution of one part to the gradients of some samples."""
    inputs, gradients = rows.inputs[some], rows.gradients[some]
    if part.role == "offset":
        return gradients.sum(1)
    if part.role == "scale":
        return (inputs * gradients).sum(1)
    if inputs.is_floating_point():
        sides = (inputs, gradients) if part.transposed else (gradients, inputs)
        return sides[0].transpose(1, 2) @ sides[1]
    result = gradients.new_zeros(len(gradients), *parameter.shape)  # for an embedding
    place = inputs.unsqueeze(-1).expand(gradients.shape)
    return result.scatter_add_(1, place, gradients)
