"""Calls of blocks inside a model's own forward: replace the blocks there, record their arguments, and repeat them."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hesse.errors import HesseError, UnsupportedModelError, reason
from hesse.networks.encoder_decoder import decoder_inputs
from hesse.networks.network import Network
from hesse.networks.output_form import Element, OutputForm
from hesse.networks.towers import without_cache
from hesse.passes.block_state import Shared, StateKey

RETURNED = "returned"
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
ENCODED = "encoder_hidden_states"  # the argument of a decoder's blocks
BlockCall = dict[str, Any]  # keyword arguments of a block
Calls = list[BlockCall | None]  # of each block; None for one that the model does not call
Constants = dict[tuple[int, torch.Size], tuple[Any, ...]]  # by block and shape of the ids: what it returns, if constant


@dataclass(frozen=True)
class Returned:
    """Argument of a block that is an element of what an earlier block returned."""

    block: int
    element: int

    @property
    def key(self) -> StateKey:
        """Return its key among the tensors next to the hidden states."""
        return RETURNED, self.block, self.element


def run_block(
    module: nn.Module, index: int, calls: Calls, hidden: Tensor, shared: Shared, more: Mapping[str, Tensor] = NOTHING
) -> tuple[Tensor, Shared]:
    """Return the hidden states behind block `index`, which is `module`, and the tensors that blocks share then.

    `more` are further arguments. Mappings among the arguments, in which blocks leave tensors for later ones, are copied
    for each run.
    """
    call = calls[index]
    if call is None:
        return hidden, shared
    if not torch.is_inference_mode_enabled():  # where autograd may keep them
        shared = {key: value.clone() if value.is_inference() else value for key, value in shared.items()}
    arguments = {name: _filled(name, value, shared) for name, value in call.items()}
    result = module(hidden, **arguments, **more)
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


def independent(call: BlockCall | None) -> bool:
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


def _is_read(key: StateKey, calls: Calls, index: int) -> bool:
    """True if a block behind block `index` gets what an earlier one returned."""
    later = (value for call in calls[index + 1 :] if call is not None for value in call.values())
    return any(isinstance(value, Returned) and value.key == key for value in later)


class CallRecorder:
    """Stub of all blocks that passes hidden states on unchanged, and records the arguments of each block."""

    def __init__(self, network: Network, constants: Constants, shape: torch.Size) -> None:
        self.calls: Calls = [None] * len(network.blocks)
        self.first: dict[int, Tensor] = {}  # the hidden states before each list of blocks, by its first block called
        self.encoded = torch.Size()  # the shape of the encoder's states that a decoder reads
        self._network, self._constants, self._shape = network, constants, shape
        self._model = type(network.model).__name__
        self._made: list[tuple[Tensor, Returned]] = []

    def note(self, index: int, hidden: Tensor, call: BlockCall, rest: list[Tensor | None]) -> Tensor:
        """Record one call, for which the block is going to return `rest` next to the hidden states.

        Raises:
            UnsupportedModelError: the model does more between its blocks than to call one after the other.
        """
        entry = self._network.decoder_entry
        inside = entry is not None and index > entry
        begin = next((number for number in self.first if (entry is not None and number > entry) == inside), index)
        first = self.first.setdefault(begin, hidden)
        if hidden.shape != first.shape:
            raise UnsupportedModelError(f"the blocks of {self._model} change the shape of their input")
        if hidden is not first and not (hidden.dtype == first.dtype and torch.equal(hidden, first)):
            raise UnsupportedModelError(
                f"{self._model} changes hidden states between its blocks, which a pass over blocks cannot repeat"
            )
        if self.calls[index] is not None:
            raise UnsupportedModelError(
                f"{self._model} calls its blocks several times for the same tokens, which a pass over blocks cannot "
                "repeat: call hesse.compress from Python with the module"
            )
        self._fill_constants(index, hidden, call, rest)
        if inside:
            if not isinstance(call.get(ENCODED), Tensor):
                raise UnsupportedModelError(f"the decoder's blocks of {self._model} take no {ENCODED}")
            self.encoded = call.pop(ENCODED).shape
        self.calls[index] = {name: self._described(value) for name, value in call.items()}
        return hidden

    def _fill_constants(self, index: int, hidden: Tensor, call: BlockCall, rest: list[Tensor | None]) -> None:
        """Put arguments that the block passes on, and what it returns for any hidden states, into `rest`."""
        assert self._network.output_forms is not None
        for number, element in enumerate(self._network.output_forms[index].rest):
            if element is None:
                continue
            if element.argument is not None:
                rest[number] = call.get(element.argument)
            elif element.constant:
                if (index, self._shape) not in self._constants:
                    self._constants[index, self._shape] = run_alone(self._network, index, hidden, **call)[1:]
                rest[number] = self._constants[index, self._shape][number]
            elif (made := rest[number]) is not None:
                self._made.append((made, Returned(index, number)))

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
    network: Network, forms: list[OutputForm], forward: Callable[[int, Tensor, BlockCall, list[Tensor | None]], Tensor]
) -> Iterator[None]:
    """Run `forward(index, hidden, keyword arguments, rest)` in place of each block; the modules keep their attributes.

    The block returns the result in its form, with `rest`.
    """

    def call_instead(index: int, names: list[str], *positional: Any, **call: Any) -> Any:
        call = {**dict(zip(names, positional, strict=False)), **call}
        hidden = call.pop(names[0])
        rest = [None if element is None else element.zeros(hidden) for element in forms[index].rest]
        result = forward(index, hidden, call, rest)
        return (result, *rest) if forms[index].is_tuple else result

    with _instead(network, call_instead):
        yield


@contextmanager
def _instead(network: Network, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward(index, names of parameters, *arguments)` in place of each block."""
    modules = {index: block for index, block in enumerate(network.blocks) if index != network.decoder_entry}
    for index, block in modules.items():
        names = list(inspect.signature(type(block.module).forward).parameters)[1:]
        block.module.forward = partial(forward, index, names)
    try:
        yield
    finally:
        for block in modules.values():
            del block.module.forward


def model_inputs(network: Network, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the model's inputs for token ids; a decoder that has an encoder predicts the same ids."""
    if network.decoder_entry is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": decoder_inputs(cast(PreTrainedModel, model), ids)}


def run_alone(network: Network, index: int, *positional: Any, **call: Any) -> Any:
    """Return what block `index` returns, with its weights in memory."""
    with network.loaded(network.blocks[index]) as module:
        return type(module).forward(module, *positional, **call)


def run_base(network: Network, model: nn.Module, ids: Tensor) -> None:
    """Run all of the model except its head."""
    base = cast(nn.Module, model.base_model)
    with without_cache(model):
        base(**model_inputs(network, model, ids), **({} if network.kind == "encoder" else {"use_cache": False}))


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

    def output(index: int, hidden: Tensor, call: BlockCall, rest: list[Tensor | None]) -> Tensor:
        result = hidden.as_subclass(_Output)
        result.block, result.taken = index, taken
        return result

    with replaced(network, [OutputForm(False)] * len(network.blocks), output):
        run_base(network, model, ids)
    return taken


def _element(value: Any, call: BlockCall) -> Element | None:
    """Return the description of a value that a block returns next to hidden states, when it is called with `call`."""
    if not isinstance(value, Tensor):
        return None
    return Element(value.shape, value.dtype, next((name for name, given in call.items() if given is value), None))


def _find_constants(
    rest: list[Element | None], network: Network, index: int, hidden: Tensor, call: BlockCall, output: Any
) -> list[Element | None]:
    """Mark the elements of `output` that are the same for other hidden states, such as positions' biases."""
    if all(element is None or element.argument is not None for element in rest):
        return rest
    other = run_alone(network, index, hidden.flip(-1) + 1, **call)
    same = [
        element is not None and value.shape == again.shape and torch.equal(value, again)
        for element, value, again in zip(rest, output[1:], other[1:], strict=True)
    ]
    return [
        replace(element, constant=True) if constant and element is not None and element.argument is None else element
        for element, constant in zip(rest, same, strict=True)
    ]


def _forms_of_outputs(network: Network, model: nn.Module, ids: Tensor) -> list[OutputForm]:
    """Return the forms of what the blocks return, by running the model with one block loaded at a time."""
    forms = [OutputForm(False)] * len(network.blocks)

    def run(index: int, names: list[str], *positional: Any, **call: Any) -> Any:
        output = run_alone(network, index, *positional, **call)
        if isinstance(output, tuple | list):
            call = {**dict(zip(names, positional, strict=False)), **call}
            hidden = call.pop(names[0])
            rest = _find_constants(
                [_element(value, call) for value in output[1:]], network, index, hidden, call, output
            )
            forms[index] = OutputForm(True, tuple(rest))
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
