"""Calls of blocks inside a model's own forward: replace the blocks there, record their arguments, and repeat them."""

import copy
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from hesse.errors import HesseError, UnsupportedModelError, reason
from hesse.networks.network import Network
from hesse.networks.output_form import OutputForm
from hesse.networks.towers import without_cache
from hesse.passes.block_state import Key, Shared

RETURNED = "returned"
Call = dict[str, Any]  # keyword arguments of a block
Calls = list[Call | None]  # of each block; None for one that the model does not call


@dataclass(frozen=True)
class Returned:
    """Argument of a block that is an element of what an earlier block returned."""

    block: int
    element: int

    @property
    def key(self) -> Key:
        """Return its key among the tensors beside the hidden states."""
        return RETURNED, self.block, self.element


def run_block(module: nn.Module, index: int, calls: Calls, hidden: Tensor, shared: Shared) -> tuple[Tensor, Shared]:
    """Return the hidden states behind block `index`, which is `module`, and the tensors that blocks share then.

    Mappings among the arguments, in which blocks leave tensors for later ones, are copied for each run.
    """
    call = calls[index]
    if call is None:
        return hidden, shared
    if not torch.is_inference_mode_enabled():  # where autograd may keep them
        shared = {key: value.clone() if value.is_inference() else value for key, value in shared.items()}
    arguments = {name: _filled(name, value, shared) for name, value in call.items()}
    result = module(hidden, **arguments)
    passed = {key: value for key, value in shared.items() if key[0] == RETURNED and _is_read(key, calls, index)}
    for name, value in arguments.items():
        if isinstance(value, MutableMapping):
            passed |= _entries(name, value, call[name])
    passed |= {key: value for key, value in shared.items() if key[0] not in arguments and key[0] != RETURNED}
    if not isinstance(result, tuple | list):
        return result, passed
    for element, value in enumerate(result[1:]):
        key = (RETURNED, index, element)
        if isinstance(value, Tensor) and (index + 1 == len(calls) or _is_read(key, calls, index)):
            passed[key] = value
    return cast(Tensor, result[0]), passed


def independent(call: Call | None) -> bool:
    """True if a block can run with these arguments without the blocks before it."""
    return not any(isinstance(value, MutableMapping | Returned) for value in (call or {}).values())


def _filled(name: str, value: Any, shared: Shared) -> Any:
    """Return an argument with the tensors that earlier blocks made for it."""
    if isinstance(value, Returned):
        return shared[value.key]
    if not isinstance(value, MutableMapping):
        return value
    filled, parts = copy.copy(value), dict[Any, dict[int, Tensor]]()
    for key, tensor in shared.items():
        if key[0] == name and len(key) == 2:
            filled[key[1]] = tensor
        elif key[0] == name:
            parts.setdefault(key[1], {})[cast(int, key[2])] = tensor
    for entry, tensors in parts.items():
        filled[entry] = tuple(tensors[number] for number in range(len(tensors)))
    return filled


def _entries(name: str, filled: MutableMapping[Any, Any], before: MutableMapping[Any, Any]) -> Shared:
    """Return what blocks have put into the mapping that is the argument `name`."""
    found: Shared = {}
    for entry, value in filled.items():
        if entry in before and before[entry] is value:
            continue
        if isinstance(value, Tensor):
            found[name, entry] = value
        elif isinstance(value, tuple | list) and all(isinstance(part, Tensor) for part in value):
            found |= {(name, entry, number): part for number, part in enumerate(value)}
        elif value is not None:
            raise UnsupportedModelError(f"blocks share {name}[{entry!r}], a {type(value).__name__}, which is no tensor")
    return found


def _is_read(key: Key, calls: Calls, index: int) -> bool:
    """True if a block behind block `index` gets what an earlier one returned."""
    later = (value for call in calls[index + 1 :] if call is not None for value in call.values())
    return any(isinstance(value, Returned) and value.key == key for value in later)


class CallRecorder:
    """Stub of all blocks that passes hidden states on unchanged, and records the arguments of each block."""

    def __init__(self, network: Network) -> None:
        self.calls: Calls = [None] * len(network.blocks)
        self.first: Tensor | None = None  # the hidden states before all blocks
        self._model = type(network.model).__name__
        self._made: list[tuple[Tensor, Returned]] = []

    def note(self, index: int, hidden: Tensor, call: Call, rest: list[Tensor | None]) -> Tensor:
        """Record one call, for which the block is going to return `rest` beside the hidden states.

        Raises:
            UnsupportedModelError: the model does more between its blocks than to call one after the other.
        """
        if self.first is None:
            self.first = hidden
        elif hidden.shape != self.first.shape:
            raise UnsupportedModelError(f"the blocks of {self._model} change the shape of their input")
        elif hidden is not self.first and not (hidden.dtype == self.first.dtype and torch.equal(hidden, self.first)):
            raise UnsupportedModelError(
                f"{self._model} changes hidden states between its blocks, which a pass over blocks cannot repeat"
            )
        if self.calls[index] is not None:
            raise UnsupportedModelError(
                f"{self._model} calls its blocks several times for the same tokens, which a pass over blocks cannot "
                "repeat: call hesse.compress from Python with the module"
            )
        self.calls[index] = {name: self._described(value) for name, value in call.items()}
        self._made += [(value, Returned(index, n)) for n, value in enumerate(rest) if value is not None]
        return hidden

    def _described(self, value: Any) -> Any:
        if isinstance(value, Cache):
            return None
        if isinstance(value, MutableMapping):
            return copy.copy(value)
        if isinstance(value, Tensor):
            return next((returned for made, returned in reversed(self._made) if made is value), value)
        return value


@contextmanager
def replaced(
    network: Network, forms: list[OutputForm], forward: Callable[[int, Tensor, Call, list[Tensor | None]], Tensor]
) -> Iterator[None]:
    """Run `forward(index, hidden, keyword arguments, rest)` in place of each block; the modules keep their attributes.

    The block returns the result in its form, with `rest`.
    """

    def call_instead(index: int, names: list[str], *positional: Any, **call: Any) -> Any:
        call = {**dict(zip(names, positional, strict=False)), **call}
        hidden = call.pop(names[0])
        rest = forms[index].zeros(hidden)
        result = forward(index, hidden, call, rest)
        return (result, *rest) if forms[index].is_tuple else result

    with _instead(network, call_instead):
        yield


@contextmanager
def _instead(network: Network, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward(index, names of parameters, *arguments)` in place of each block."""
    for index, block in enumerate(network.blocks):
        names = list(inspect.signature(type(block.module).forward).parameters)[1:]
        block.module.forward = partial(forward, index, names)
    try:
        yield
    finally:
        for block in network.blocks:
            del block.module.forward


def run_base(network: Network, model: nn.Module, ids: Tensor) -> None:
    """Run all of the model except its head."""
    base = cast(nn.Module, model.base_model)
    with without_cache(model):
        base(input_ids=ids, **({"use_cache": False} if network.kind == "causal-lm" else {}))


def output_forms(network: Network, model: nn.Module, ids: Tensor) -> list[OutputForm]:
    """Return what each block returns, for one sample `ids` (1, tokens); all blocks are loaded only if need be.

    Raises:
        UnsupportedModelError: the model does not run on token ids alone.
    """
    blocks = len(network.blocks)
    try:
        taken = _elements_taken(network, model, ids)
    except HesseError:
        raise
    except Exception:  # a model that takes apart what a block returns fails in any way with a tensor in its place
        return _forms_of_outputs(network, model, ids)
    if not taken:
        return [OutputForm(False)] * blocks
    if taken == {(index, 0) for index, _ in taken} and len(taken) == blocks:
        return [OutputForm(True)] * blocks
    return _forms_of_outputs(network, model, ids)  # of hidden states or of tuples


class _Output(Tensor):
    """A block's output that notes the elements that the model takes of it, as it does of a tuple."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # gives plain tensors
    block: int
    taken: set[tuple[int, int]]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            self.taken.add((self.block, key))
            return self.as_subclass(Tensor)
        return super().__getitem__(key)


def _elements_taken(network: Network, model: nn.Module, ids: Tensor) -> set[tuple[int, int]]:
    """Return which elements, as (block, element), the model takes of what blocks return, if they return a tensor."""
    taken: set[tuple[int, int]] = set()

    def output(index: int, hidden: Tensor, call: Call, rest: list[Tensor | None]) -> Tensor:
        result = hidden.as_subclass(_Output)
        result.block, result.taken = index, taken
        return result

    with replaced(network, [OutputForm(False)] * len(network.blocks), output):
        run_base(network, model, ids)
    return taken


def _forms_of_outputs(network: Network, model: nn.Module, ids: Tensor) -> list[OutputForm]:
    """Return the forms of what the blocks return, by running the model with one block loaded at a time."""
    forms = [OutputForm(False)] * len(network.blocks)

    def run(index: int, names: list[str], *positional: Any, **call: Any) -> Any:
        with network.loaded(network.blocks[index]) as module:
            output = type(module).forward(module, *positional, **call)
        forms[index] = OutputForm.of(output)
        return output

    try:
        with _instead(network, run):
            run_base(network, model, ids)
    except HesseError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(network.model).__name__} does not run on token ids alone: {reason(error)}; call hesse.compress "
            "from Python with the module and batches of its inputs"
        ) from error
    return forms
