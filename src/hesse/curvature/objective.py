"""The loss of a network on data, as a function of one flat vector of some of its parameters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesse.curvature.losses import Loss, as_loss
from hesse.errors import DataError, OptionError
from hesse.finite import all_finite

Batch = tuple[Any, Tensor]  # inputs, targets


@dataclass(frozen=True, eq=False)
class Objective:
    """L(θ) over all batches of `data`, θ the parameters called `names` one after another, row by row.

    Each product iterates over `data` again, so it must give the same batches each time, or other ones on purpose (a
    stochastic product). `forward(model, inputs)` gives the outputs; by default `model(inputs)`. The model is
    used in its present mode: call eval() where dropout or batch statistics should be off.

    Raises:
        OptionError: a name is no parameter of the model, or the parameter takes no gradient.
    """

    model: nn.Module
    loss: Loss
    data: Iterable[Batch]
    names: tuple[str, ...]
    forward: Callable[[nn.Module, Any], Tensor] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss: Loss | nn.Module,
        data: Iterable[Batch],
        names: Sequence[str] | None = None,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> "Objective":
        """Return the objective over the parameters `names`, or over all that take a gradient."""
        if isinstance(data, Iterator):
            raise OptionError("the data is an iterator, which can be walked only once: give a list or a DataLoader")
        chosen = [name for name, p in model.named_parameters() if p.requires_grad] if names is None else names
        return cls(model, as_loss(loss), data, tuple(chosen), forward)

    def __post_init__(self) -> None:
        known = dict(self.model.named_parameters())
        for name in self.names:
            if name not in known:
                raise OptionError(f"the model has no parameter {name!r}; one is called {next(iter(known), 'nothing')}")
            if not known[name].requires_grad:
                raise OptionError(f"the parameter {name} takes no gradient: set requires_grad, or leave it out")
        if not self.names:
            raise OptionError("no parameter takes a gradient: set requires_grad on some")

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters themselves."""
        known = dict(self.model.named_parameters())
        return tuple(known[name] for name in self.names)

    @cached_property
    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return dict(zip(self.names, self.parameters, strict=True))

    @property
    def size(self) -> int:
        """Entries of θ."""
        return sum(p.numel() for p in self.parameters)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return a flat vector (..., size) as one tensor (..., *shape) a parameter."""
        pieces = torch.split(vector, [p.numel() for p in self.parameters], dim=-1)
        return tuple(
            piece.reshape(*vector.shape[:-1], *p.shape) for piece, p in zip(pieces, self.parameters, strict=True)
        )

    def join(self, pieces: Sequence[Tensor | None]) -> Tensor:
        """Undo `split`: return one tensor a parameter as a flat vector (size,), with zeros for None."""
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if piece is None else piece.flatten()
                for piece, p in zip(pieces, self.parameters, strict=True)
            ]
        )

    def batches(self) -> Iterator[Batch]:
        """Return the data, on the model's device.

        Raises:
            DataError: there is none.
        """
        device, some = self.parameters[0].device, False
        for inputs, targets in self.data:
            some = True
            yield _to_device(inputs, device), targets.to(device)
        if not some:
            raise DataError("the data holds no batch: give at least one sample")

    def sample_targets(self, inputs: Any, targets: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return targets of a batch drawn from the model's own distribution."""
        with torch.no_grad():
            return self.loss.sample_targets(self.outputs(inputs), targets, generator)

    def outputs(self, inputs: Any, parameters: Sequence[Tensor] | None = None) -> Tensor:
        """Return the model's outputs, with `parameters` in the place of its own ones where given."""
        with differentiable_twice():
            if parameters is None:
                return self.call(self.model, inputs)
            replaced = {f"model.{name}": tensor for name, tensor in zip(self.names, parameters, strict=True)}
            return cast(Tensor, functional_call(_Forward(self.model, self.call), replaced, (inputs,)))

    def outputs_once(self, inputs: Any) -> Tensor:
        """Return the model's outputs where one derivative of them is enough: attention may be fused."""
        return self.call(self.model, inputs)

    def call(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the outputs of `model`, this one or a copy, for `inputs`.

        Raises:
            OptionError: the output is no tensor.
        """
        with layer_by_layer():
            outputs = model(inputs) if self.forward is None else self.forward(model, inputs)
        if not isinstance(outputs, Tensor):
            raise OptionError(
                f"the model gives {type(outputs).__name__}, not a tensor: give forward=lambda model, inputs: ..."
            )
        return outputs

    @cached_property
    def scale(self) -> float:
        """The factor of the sum over terms: 1, or one over the number of terms in all data.

        Raises:
            DataError: there is no term.
        """
        if self.loss.reduction == "sum":
            return 1.0
        return self.scale_of(sum(self.count(inputs, targets) for inputs, targets in self.batches()))

    def count(self, inputs: Any, targets: Tensor) -> int:
        """Return the number of terms of the loss of some samples."""
        known = self.loss.count(targets)
        if known is not None:
            return known
        with torch.no_grad():
            return self.loss.terms(self.outputs(inputs), targets).numel()

    def scale_of(self, terms: int) -> float:
        """Return the factor of the sum over all `terms` terms.

        Raises:
            DataError: there is none.
        """
        if terms == 0:
            raise DataError("no sample has a term of the loss: all targets are masked")
        return 1.0 if self.loss.reduction == "sum" else 1 / terms

    def value(self) -> float:
        """Return L(θ).

        Raises:
            DataError: the loss is not defined for these targets.
        """
        total = 0.0
        with torch.no_grad():
            for inputs, targets in self.batches():
                outputs = self.outputs(inputs)
                self.loss.check(outputs, targets)
                total += float(self.loss.terms(outputs, targets).double().sum())
        return total * self.scale

    def gradient(self) -> Tensor:
        """Return ∂L/∂θ (size,).

        Raises:
            DataError: it is not finite.
        """
        total = torch.zeros(self.size, dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        for inputs, targets in self.batches():
            loss = self.loss.terms(self.outputs(inputs), targets).sum()
            total += self.join(torch.autograd.grad(loss, self.parameters, allow_unused=True))
        if not all_finite(total):
            raise DataError("the gradient holds NaN or infinity: the loss overflows on this data")
        return total * self.scale


def label_generator(seed: int | None) -> torch.Generator | None:
    """Return the generator that draws the labels of all data in order; None draws new labels each time."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def each(function: Callable[..., Any], columns: tuple[Tensor, ...]) -> Any:
    """Return `function` of each leading index of `columns`, together by vmap or one by one where vmap fails.

    vmap fails for networks whose path depends on the data, such as mixtures of experts; the result is the same.
    """
    try:
        return vmap(function, randomness="different")(*columns)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
    results = [function(*(column[k] for column in columns)) for k in range(len(columns[0]))]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


class _Forward(nn.Module):
    """The model behind a user's forward function, so that functional_call replaces its parameters there too."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, inputs: Any) -> Tensor:
        return self.call(self.model, inputs)


def _to_device(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {key: _to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(_to_device(value, device) for value in inputs)
    return inputs


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Turn off the fused path of torch's own transformer layers in eval mode, which bypasses their submodules."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode while inside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Compute attention in plain operations: fused ones have no second derivative and no forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
