"""Kronecker factors of every linear and convolutional layer of a network, from its inputs and output gradients."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hesse.curvature import EigenKronecker, Gram, Kronecker, Objective
from hesse.curvature.symmetric import add_upper, mirrored
from hesse.errors import DataError, UnsupportedModelError
from hesse.estimation.gradients import Kind, labelled

Per = Literal["position", "sample"]
Pair = tuple[Tensor, Tensor]  # inputs (samples, positions, in), output gradients (samples, positions, out)


@dataclass(frozen=True)
class LayerFactors:
    """What one pass over data gives of a layer; `bias` acts on a bias (out,), None without one."""

    gram: Gram
    kronecker: Kronecker
    bias: Gram | None


def kronecker_factors(
    objective: Objective, kind: Kind = "sampled", per: Per = "position", *, seed: int = 0
) -> dict[str, LayerFactors]:
    """Gram and Kronecker factors of each linear and convolutional layer with a parameter in the objective.

    One forward and one backward pass, each input and gradient seen once. `per="position"` takes the positions of a
    sample (tokens, pixels) as independent samples (K-FAC expand); `per="sample"` adds up the gradients and averages
    the inputs over a sample's positions (K-FAC reduce). Positions whose gradient is exactly zero, such as padding,
    count in neither factor. Calls of one layer, or of layers that share a weight, are further positions; a weight that
    is an embedding's too is left out. The unit is that of the objective's loss; a convolution's weight is taken as
    (out, in · kernel). Source: Martens and Grosse, 2015; Grosse and Martens, 2016; Eschenhagen et al., 2023.

    Raises:
        UnsupportedModelError: no layer is left, or a convolution has groups.
        DataError: an input or a gradient is not finite, or no position has a gradient.
    """
    sums: dict[str, _Sums] = {}
    for name, module, pair in _walk(objective, kind, seed):
        inputs, gradients = _positions(pair, per)
        if name not in sums:
            sums[name] = _Sums(module, per, inputs, gradients)
        sums[name].add(inputs, gradients)
    return {name: layer.factors(name, objective.scale) for name, layer in sums.items()}


def eigen_kronecker(
    objective: Objective,
    factors: dict[str, LayerFactors],
    kind: Kind = "sampled",
    *,
    seed: int = 0,
) -> dict[str, EigenKronecker]:
    """The eigenvectors of `factors` with eigenvalues measured in a second pass, at the factors' own reduction.

    Per position Λ = Σ (Q_Gᵀg)² (Q_Aᵀx)² over positions; per sample Λ = Σ (Q_Gᵀ (Σ g xᵀ) Q_A)² with the sample's whole
    gradient. With the labels of the factors (the same `kind` and `seed`) no Kronecker matrix is nearer to the truth.
    Source: George et al., 2018.
    """
    vectors = {name: tuple(v.float() for v in layer.kronecker.eigenvectors()) for name, layer in factors.items()}
    totals: dict[str, Tensor] = {}
    for name, _, (inputs, gradients) in _walk(objective, kind, seed):
        left, right = (v.to(inputs) for v in vectors[name])
        outputs, rotated = gradients @ left, inputs @ right
        if factors[name].kronecker.per == "position":
            square = outputs.flatten(0, 1).square().T @ rotated.flatten(0, 1).square()
        else:
            square = (outputs.transpose(1, 2) @ rotated).square().sum(0)
        totals[name] = totals[name] + square if name in totals else square
    return {
        name: EigenKronecker(
            output_vectors=vectors[name][0].to(total),
            input_vectors=vectors[name][1].to(total),
            eigenvalues=total * objective.scale,
            per=factors[name].kronecker.per,
        )
        for name, total in totals.items()
    }


class _Sums:
    """Σ x xᵀ and Σ g gᵀ of one layer."""

    def __init__(self, module: nn.Module, per: Per, inputs: Tensor, gradients: Tensor) -> None:
        self.has_bias = getattr(module, "bias", None) is not None
        self.inputs = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
        self.gradients = gradients.new_zeros(gradients.shape[1], gradients.shape[1])
        self.count = 0
        self.per: Per = per

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add rows (positions, in) and (positions, out)."""
        add_upper(self.inputs, inputs)
        add_upper(self.gradients, gradients)
        self.count += len(inputs)

    def factors(self, name: str, scale: float) -> LayerFactors:
        if not self.count:
            raise DataError(f"no position of {name} has a gradient: the loss does not depend on its output")
        second_moment, outputs = mirrored(self.inputs) / self.count, mirrored(self.gradients) * scale
        for what, factor in (("inputs", second_moment), ("output gradients", outputs)):
            if not bool(torch.isfinite(factor).all()):
                raise DataError(f"the {what} of {name} hold NaN or infinity")
        bias = Gram(second_moment=outputs, tokens=self.count) if self.has_bias else None
        return LayerFactors(
            gram=Gram(second_moment=second_moment, tokens=self.count),
            kronecker=Kronecker(output_factor=outputs, input_factor=second_moment, per=self.per),
            bias=bias,
        )


def _positions(pair: Pair, per: Per) -> tuple[Tensor, Tensor]:
    """Rows (positions, in) and (positions, out) whose products a factor sums."""
    inputs, gradients = pair
    live = gradients.abs().amax(-1) > 0  # (samples, positions)
    if per == "position":
        return inputs[live], gradients[live]
    number = live.sum(1, keepdim=True)
    mean = (inputs * live[..., None]).sum(1) / number.clamp(min=1)
    some = number[:, 0] > 0
    return mean[some], gradients.sum(1)[some]


class _Recorder:
    """Notes what reaches each call of the given modules, and what they give, while it is open."""

    def __init__(self, modules: dict[str, list[nn.Module]]) -> None:
        self.calls: list[tuple[str, Tensor, Tensor]] = []  # name, input, output
        self._modules = modules
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "_Recorder":
        for name, sharing in self._modules.items():
            self._hooks += [module.register_forward_hook(partial(self._note, name)) for module in sharing]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.calls.append((name, arguments[0].detach(), output))
        return output.clone()  # the network may go on to change it in place


def _walk(objective: Objective, kind: Kind, seed: int) -> Iterator[tuple[str, nn.Module, Pair]]:
    """Each layer's inputs and output gradients, batch by batch; calls of one layer are further positions."""
    modules = _layers(objective)
    for inputs, targets in labelled(objective, kind, seed):
        with _Recorder(modules) as recorder:
            loss = objective.loss.terms(objective.outputs(inputs), targets).sum()
        slopes = torch.autograd.grad(loss, [output for _, _, output in recorder.calls], allow_unused=True)
        pairs: dict[str, list[Pair]] = {}
        for (name, received, output), slope in zip(recorder.calls, slopes, strict=True):
            gradient = torch.zeros_like(output) if slope is None else slope
            pairs.setdefault(name, []).append(_as_matrices(modules[name][0], received, gradient))
        for name, several in pairs.items():
            positions, gradients = zip(*several, strict=True)
            yield name, modules[name][0], (torch.cat(positions, dim=1), torch.cat(gradients, dim=1))


def _layers(objective: Objective) -> dict[str, list[nn.Module]]:
    """The layers of each weight in the objective, by the name of its first."""
    layers: dict[str, list[nn.Module]] = {}
    for name, parameter in zip(objective.names, objective.parameters, strict=True):
        owner = name.rpartition(".")[0]
        sharing = [module for module in objective.model.modules() if getattr(module, "weight", None) is parameter]
        if not sharing or not all(isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) for module in sharing):
            continue
        module = sharing[0]
        if getattr(module, "groups", 1) != 1:
            raise UnsupportedModelError(f"{owner} is a convolution with groups, which has no Kronecker factors here")
        if isinstance(getattr(module, "padding", 0), str) or getattr(module, "padding_mode", "zeros") != "zeros":
            raise UnsupportedModelError(f"{owner} pads by name or not with zeros: its patches are not known here")
        layers[owner] = sharing
    if not layers:
        raise UnsupportedModelError("none of the objective's parameters is the weight of a Linear, Conv1d or Conv2d")
    return layers


def _as_matrices(module: nn.Module, inputs: Tensor, gradients: Tensor) -> Pair:
    """(samples, positions, in) and (samples, positions, out), with patches for a convolution's inputs."""
    if isinstance(module, nn.Linear):
        samples = len(inputs)
        return inputs.reshape(samples, -1, inputs.shape[-1]), gradients.reshape(samples, -1, gradients.shape[-1])
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    flat = isinstance(module, nn.Conv1d)
    image = inputs.unsqueeze(2) if flat else inputs

    def pair(value: tuple[int, ...], filler: int) -> tuple[int, ...]:
        return (filler, *value) if flat else value

    assert not isinstance(module.padding, str)
    patches = nn.functional.unfold(
        image,
        pair(module.kernel_size, 1),
        pair(module.dilation, 1),
        pair(module.padding, 0),
        pair(module.stride, 1),
    )
    return patches.transpose(1, 2), gradients.flatten(2).transpose(1, 2)
