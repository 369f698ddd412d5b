"""Parts: a network's parameters as matrices, offsets and scales of their layers."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hesse.curvature import Objective
from hesse.errors import UnsupportedModelError

Role = Literal["matrix", "offset", "scale"]
MATRIX_ROLES: dict[str, Role] = {"weight": "matrix", "bias": "offset"}
SCALE_ROLES: dict[str, Role] = {"weight": "scale", "bias": "offset"}
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, Conv1D)


@dataclass(frozen=True)
class ParameterPart:
    """A parameter as layers of one kind use it; most have one part, and a weight tied to an embedding has two.

    A matrix multiplies a layer's inputs, an offset is added to its outputs, and a scale multiplies them entry by entry.
    """

    parameter: str  # its name in the objective
    role: Role
    modules: tuple[str, ...]  # the modules whose calls are its positions
    transposed: bool = False  # the matrix is (in, out)


def parts_of(objective: Objective) -> tuple[dict[str, list[ParameterPart]], dict[str, nn.Module]]:
    """Return the parts of each parameter of the objective, and the modules by name; no parts for other parameters.

    Raises:
        UnsupportedModelError: a layer mixes the samples of a batch, or a convolution has groups.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in objective.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise UnsupportedModelError(
                f"{name} takes statistics over a batch, so samples depend on one another: call model.eval() first"
            )
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module, key))
    parts: dict[str, list[ParameterPart]] = {}
    modules: dict[str, nn.Module] = {}
    for name, parameter in zip(objective.names, objective.parameters, strict=True):
        uses: dict[tuple[Role, bool], list[str]] = {}
        for owner, module, key in owners[id(parameter)]:
            role = _role(module, key)
            if role is None:
                uses.clear()  # one unknown use invalidates the others
                break
            _check(owner, module)
            modules[owner] = module
            uses.setdefault((role, role == "matrix" and input_side_first(module)), []).append(owner)
        parts[name] = [ParameterPart(name, role, tuple(found), first) for (role, first), found in uses.items()]
    return parts, modules


def _role(module: nn.Module, key: str) -> Role | None:
    if isinstance(module, MATRICES):
        return MATRIX_ROLES.get(key)
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if own <= SCALE_ROLES.keys() and not any(True for _ in module.children()):
        return SCALE_ROLES.get(key)
    return None


def input_side_first(module: nn.Module) -> bool:
    """True if the weight is (in, out)."""
    return isinstance(module, nn.Embedding | Conv1D)


def _check(name: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return
    if module.groups != 1:
        raise UnsupportedModelError(f"{name} is a convolution with groups, which is not a single matrix: leave it out")


def as_rows(module: nn.Module, inputs: Tensor, gradients: Tensor, flat: bool) -> tuple[Tensor, Tensor]:
    """Return the inputs (samples, positions, in) of a call of `module`, and the gradients (samples, positions, out).

    Token ids stay (samples, positions), a convolution's inputs become patches, and a scale's inputs are the values that
    it multiplies. `flat` treats all rows of the call as positions of one sample.
    """
    if isinstance(module, nn.Linear | Conv1D):
        return _grouped(inputs, 1, flat), _grouped(gradients, 1, flat)
    if isinstance(module, nn.Embedding):
        return _grouped(inputs, 0, flat), _grouped(gradients, 1, flat)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return seen_by(module, inputs), gradients.flatten(2).transpose(1, 2)
    axes, entries = _scaled_axes(module)
    scaled = _scaled_inputs(module, inputs).movedim(axes, tuple(range(-len(axes), 0)))
    aligned = gradients.movedim(axes, tuple(range(-len(axes), 0)))
    shape = (1, -1, entries) if flat else (len(gradients), -1, entries)
    return scaled.reshape(shape), aligned.reshape(shape)


def _grouped(tensor: Tensor, inner: int, flat: bool) -> Tensor:
    """Return `tensor` (samples, ..., *inner) as (samples, positions, *inner)."""
    return tensor.reshape(1 if flat else len(tensor), -1, *tensor.shape[tensor.ndim - inner :])


def seen_by(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the inputs (..., in) of each output; of a convolution, its patches (samples, positions, in · kernel)."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return inputs
    line = isinstance(module, nn.Conv1d)

    def pair(value: tuple[int, ...], filler: int) -> tuple[int, ...]:
        return (filler, *value) if line else value

    padding, zeros = module.padding, module.padding_mode == "zeros"
    if isinstance(padding, str) or not zeros:  # unfold does not support these
        sides = module._reversed_padding_repeated_twice
        inputs = nn.functional.pad(inputs, sides, "constant" if zeros else module.padding_mode)
        padding = (0,) * len(module.kernel_size)
    return nn.functional.unfold(
        inputs.unsqueeze(2) if line else inputs,
        pair(module.kernel_size, 1),
        pair(module.dilation, 1),
        pair(padding, 0),
        pair(module.stride, 1),
    ).transpose(1, 2)


def fits(module: nn.Module, output: Tensor) -> bool:
    """True if `output` can be the output of such a layer; a user's module may only resemble a scale."""
    if isinstance(module, MATRICES):
        return True
    axes, _ = _scaled_axes(module)
    shape = next(p.shape for p in module._parameters.values() if p is not None)
    return output.ndim > len(axes) and tuple(output.shape[axis] for axis in axes) == tuple(shape)


def _scaled_axes(module: nn.Module) -> tuple[tuple[int, ...], int]:
    """Return the axes of a scale's output that its parameters run along, and their number of entries."""
    parameter = next(p for p in module._parameters.values() if p is not None)
    if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase):
        return (1,), parameter.numel()
    return tuple(range(-parameter.ndim, 0)), parameter.numel()


def _scaled_inputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return x of the output x ⊙ weight + ...: the output at weight one minus the output at weight zero."""
    outputs = []
    for value in (1.0, 0.0):
        replaced = {name: torch.full_like(p, value) for name, p in module.named_parameters() if name == "weight"}
        outputs.append(functional_call(module, replaced, (inputs,)))
    return cast(Tensor, outputs[0] - outputs[1])
