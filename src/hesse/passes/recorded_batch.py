"""Record the inputs and output gradients of each layer in one pass of some samples."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hesse.passes.layer_stops import patching
from hesse.passes.parts import ParameterPart, as_rows, fits

GradientUnit = Literal["position", "sample"]
Flat = tuple[Tensor, Tensor]  # inputs (n, in) or token ids (n,), and gradients (m, out)


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs of a layer, and the gradient of each sample's summed loss at its outputs."""

    inputs: Tensor  # (samples, positions, in), or token ids (samples, positions)
    gradients: Tensor  # (samples, positions, out)
    source: tuple[object, ...]  # equal for layers whose inputs are the same rows of the same tensors
    vocabulary: int = 0  # the number of token ids

    @cached_property
    def live(self) -> Tensor:
        """Return a mask (samples, positions) of positions with a gradient: padding has none, and is not counted."""
        return (self.gradients.amax(-1) > 0) | (self.gradients.amin(-1) < 0)

    @cached_property
    def positions(self) -> Flat:
        """Return the live positions' inputs, and all gradients: zero gradients add nothing."""
        inputs = self.inputs.flatten(0, 1) if bool(self.live.all()) else self.inputs[self.live]
        return inputs, self.gradients.flatten(0, 1)

    @cached_property
    def samples(self) -> Flat:
        """Return, for samples with live positions, the mean input over these positions and the summed gradient."""
        number = self.live.sum(1)
        some = number > 0
        mask = self.live.to(self.gradients)
        if self.vocabulary:
            summed = mask.new_zeros(len(mask), self.vocabulary).scatter_add_(1, self.inputs, mask)
        else:
            summed = (self.inputs * mask[..., None]).sum(1)
        return (summed / number.clamp(min=1)[:, None])[some], self.gradients.sum(1)[some]

    def per(self, per: GradientUnit) -> Flat:
        """Return `positions` or `samples`."""
        return self.positions if per == "position" else self.samples


class RecordedBatch:
    """Recorded calls of every layer for some samples, and gradients (samples, *shape) of parameters of no layer."""

    def __init__(self, rows: dict[str, Rows], samples: int) -> None:
        self.samples = samples
        self.others: dict[str, Tensor] = {}
        self._rows: dict[tuple[str, ...], Rows] = {(name,): found for name, found in rows.items()}

    def rows(self, part: ParameterPart) -> Rows | None:
        """Return the rows of a part, with all calls of its modules as positions; None if none was called."""
        if part.modules not in self._rows:
            found = [self._rows[name,] for name in part.modules if (name,) in self._rows]
            if not found:
                return None
            self._rows[part.modules] = concatenate(found)
        return self._rows[part.modules]


def concatenate(several: list[Rows]) -> Rows:
    """Concatenate several calls of one layer."""
    if len(several) == 1:
        return several[0]
    return Rows(
        torch.cat([rows.inputs for rows in several], dim=1),
        torch.cat([rows.gradients for rows in several], dim=1),
        tuple(place for rows in several for place in rows.source),
        several[0].vocabulary,
    )


class Recorder:
    """Recorder of the inputs and outputs of each call of the given modules, while it is open.

    The network continues with copies of the outputs of modules in `copied`, because it changes them in place.
    """

    def __init__(self, modules: dict[str, nn.Module], copied: Iterable[str] = ()) -> None:
        self.calls: list[tuple[str, Tensor, Tensor]] = []  # name, input, output
        self.without_gradients: set[str] = set()  # modules that the network calls where gradients are off
        self._versions: list[int] = []
        self._modules, self._copied = modules, set(copied)
        self._hooks = ExitStack()

    def __enter__(self) -> "Recorder":
        for name, module in self._modules.items():
            self._hooks.enter_context(module.register_forward_hook(partial(self._note, name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _note(
        self, name: str, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        received = positional[0] if positional else next(iter(named.values()), None)
        if not (isinstance(received, Tensor) and isinstance(output, Tensor) and fits(module, output)):
            return output
        if not torch.is_grad_enabled():
            self.without_gradients.add(name)
        if not output.requires_grad:  # it and everything before it is frozen
            output = output.detach().requires_grad_()
        self.calls.append((name, received.detach(), output))
        self._versions.append(output._version)
        return output.clone() if name in self._copied else output

    @property
    def changed(self) -> set[str]:
        """Return the modules whose outputs were changed in place, so that their gradients are not available."""
        calls = zip(self.calls, self._versions, strict=True)
        return {name for (name, _, output), version in calls if output._version != version}

    @property
    def outputs(self) -> list[Tensor]:
        """Return the outputs of all calls."""
        return [output for _, _, output in self.calls]

    def leading(self, samples: int, dimensions: int) -> bool:
        """True if the first dimension of every call is the samples, not all their positions."""
        return all(len(o) == samples and not (o.ndim == 2 < dimensions) for o in self.outputs)

    def rows(self, gradients: Iterable[Tensor | None], flat: bool) -> dict[str, Rows]:
        """Return the rows of each module, with the gradients at `outputs`; `flat` treats all rows as one sample."""
        calls: dict[str, list[Rows]] = {}
        with torch.no_grad():
            for (name, received, output), gradient in zip(self.calls, gradients, strict=True):
                place: tuple[object, ...] = (received.data_ptr(), received.shape, received.stride(), received._version)
                place = (*place, patching(self._modules[name]))
                slope = torch.zeros_like(output) if gradient is None else gradient
                inputs, outputs = as_rows(self._modules[name], received, slope, flat)
                rows = Rows(inputs, outputs, (place,), getattr(self._modules[name], "num_embeddings", 0))
                calls.setdefault(name, []).append(rows)
        return {name: concatenate(several) for name, several in calls.items()}


def backward(loss: Tensor, recorder: Recorder, parameters: Iterable[Tensor] = ()) -> tuple[Any, Any]:
    """Return the gradients of `loss` at the recorded outputs and at `parameters`; None where it depends on none."""
    outputs, parameters = recorder.outputs, list(parameters)
    if not loss.requires_grad or not (outputs or parameters):
        return [None] * len(outputs), [None] * len(parameters)
    found = torch.autograd.grad(loss, [*outputs, *parameters], allow_unused=True)
    return found[: len(outputs)], found[len(outputs) :]
