"""Stream calibration data through a network, block after block."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hesse.checkpoints.tensor_store import StoredTensor, TensorStore
from hesse.curvature.losses import input_ids, next_tokens, scored_tokens
from hesse.errors import DataError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.networks.encoder_decoder import decoder_inputs
from hesse.networks.layout import vocabulary
from hesse.networks.network import BlockReturns, Network
from hesse.networks.towers import without_cache
from hesse.passes.joint_state import JointState

LOGITS_LIMIT = 1 << 25  # of a batch that is evaluated
BATCH_TOKENS = 2048  # small enough for the caches of a CPU, large enough for efficient products
ENCODED = "encoder_hidden_states"  # the argument of a decoder's blocks

Replacement = Callable[[int, Tensor, dict[str, Any]], Tensor | tuple[Any, ...]]
PassedOn = dict[tuple[int, torch.Size], tuple[Any, ...]]  # by first block of a list and shape of the ids


class CalibrationBatch(Protocol):
    """One batch of samples that calibration passes through a network's blocks."""

    def pass_block(self, module: nn.Module, index: int) -> None:
        """Run block number `index`, which is `module`, on the hidden states; keep its output for the next block."""

    def arguments(self, index: int) -> Any:
        """Return the other arguments of block number `index`, whose tensors several batches may share."""


@dataclass(eq=False)
class StreamBatch:
    """One batch of samples between two blocks: token ids, hidden states, and the other arguments of each block."""

    given: Tensor  # (samples, tokens): token ids as `start` takes them
    targets: Tensor  # (samples, tokens): the token that each position predicts, or -100 where none is scored
    waiting: StoredTensor  # the hidden states
    calls: list[dict[str, Any]]  # keyword arguments, one dictionary per block
    shelf: TensorStore  # where hidden states wait between two blocks
    step: int = 0  # number of blocks passed
    joint: JointState | None = None  # of the hidden states inside a decoder that has an encoder

    @property
    def ids(self) -> Tensor:
        """Return the token ids (samples, tokens) as the model reads them."""
        return input_ids(self.given)

    @property
    def hidden(self) -> Tensor:
        """Return the hidden states (samples, tokens, width) from the store; inside such a decoder the joint state."""
        return self.waiting.tensor()

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self.step += 1
        self.waiting = self.shelf.keep(hidden, self.step)

    def pass_block(self, module: nn.Module, index: int) -> None:
        """Run block number `index`, which is `module`, on the hidden states, and keep its output for the next."""
        self.hidden = self.through(module, index)

    def arguments(self, index: int) -> Any:
        """Return the other arguments of block number `index`."""
        return self.calls[index]

    def through(self, module: nn.Module, index: int, hidden: Tensor | None = None) -> Tensor:
        """Return the output (samples, tokens, width) of block `index`, which is `module`, for the hidden states."""
        hidden = self.hidden if hidden is None else hidden
        if self.joint is None or index <= self.joint.entry:
            return _first(module(hidden, **self.calls[index]))
        own, encoded = self.joint.split(hidden)
        return self.joint.join(_first(module(own, **{**self.calls[index], ENCODED: encoded})), encoded)


def calibration_batch(length: int) -> int:
    """Return the number of samples of `length` tokens per batch."""
    return max(BATCH_TOKENS // length, 1)


def evaluation_batch(network: Network, length: int) -> int:
    """Return the number of samples of `length` tokens whose logits stay within `LOGITS_LIMIT`."""
    return max(LOGITS_LIMIT // (vocabulary(network.model) * length), 1)


def start(network: Network, batches: Iterable[Tensor], shelf: TensorStore | None = None) -> list[StreamBatch]:
    """Compute the first block's input for each batch of token ids (samples, tokens), and the blocks' other arguments.

    Tokens that `hide_from_loss` hid pass like others, but are no targets. Hidden states are kept in `shelf`, or in
    memory.
    """
    flows: list[StreamBatch] = []
    shelf = TensorStore() if shelf is None else shelf
    passed_on: PassedOn = {}
    with network.surroundings() as model, torch.no_grad():
        for ids in batches:
            flow = _record(network, model, ids.to(network.device), shelf, passed_on)
            if flows:
                flow.calls = [_reuse(new, old) for new, old in zip(flow.calls, flows[-1].calls, strict=True)]
            flows.append(flow)
    return flows


def finish(network: Network, model: nn.Module, flow: StreamBatch, hidden: Tensor | None = None) -> Tensor:
    """Compute the model's output from a flow's hidden states, or `hidden`, after all blocks, by its own forward.

    The output is logits (samples, tokens, vocabulary), or an encoder's last hidden states (samples, tokens, width).
    `model` is the model yielded by `network.surroundings()`.
    """
    passed, first = flow.hidden if hidden is None else hidden, 0
    if flow.joint is not None:
        (passed, _), first = flow.joint.split(passed), flow.joint.entry + 1

    def inject(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        return passed if index == first else hidden

    inputs = model_inputs(network, model, flow.ids)
    with _replaced(network, inject), without_cache(model):
        if network.kind == "encoder":
            result = model.base_model(**inputs).last_hidden_state  # type: ignore[operator]
        else:
            result = model(**inputs, use_cache=False).logits
    assert isinstance(result, Tensor)
    return result


def advance(flows: Iterable[StreamBatch], module: nn.Module, index: int, block: str | None = None) -> None:
    """Pass all flows through block number `index`; with its name `block`, check that the output is finite.

    Raises:
        DataError: the output holds NaN or infinity.
    """
    with torch.no_grad():
        for flow in flows:
            hidden = flow.through(module, index)
            if block is not None and not all_finite(hidden):
                raise DataError(
                    f"the output of {block} holds NaN or infinity: the model overflows on this data, or its weights "
                    "are damaged"
                )
            flow.hidden = hidden


def take_up(flows: Iterable[StreamBatch], waiting: Iterable[StoredTensor], step: int) -> None:
    """Restore flows to their state after `step` blocks, with their hidden states `waiting`."""
    for flow, hidden in zip(flows, waiting, strict=True):
        flow.waiting, flow.step = hidden, step


def _record(network: Network, model: nn.Module, given: Tensor, shelf: TensorStore, passed_on: PassedOn) -> StreamBatch:
    """Run the model with blocks that return their input, and record the arguments of each block."""
    if network.block_returns is None:
        network.block_returns = _block_returns(network, model, input_ids(given[:1]))
    returns, entry = network.block_returns, network.decoder_entry
    # A decoder that has an encoder predicts the ids themselves.
    targets = scored_tokens(given) if network.kind == "seq2seq-lm" else next_tokens(given)
    ids = input_ids(given)
    calls: list[dict[str, Any]] = []
    first: dict[int, Tensor] = {}  # hidden states by the first block of each list
    encoded: list[torch.Size] = []

    def note(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor | tuple[Any, ...]:
        if index == 0:
            calls.clear()
        begin = index if index in _first_blocks(network) else max(first)
        if first.setdefault(begin, hidden).shape != hidden.shape:
            raise UnsupportedModelError(f"the blocks of {type(model).__name__} change the shape of their input")
        key = (begin, ids.shape)
        if returns[index].passes_on and key not in passed_on:
            passed_on[key] = _run_alone(network, index, hidden, call)[1:]
        if entry is not None and index > entry:
            if not isinstance(call.get(ENCODED), Tensor):
                raise UnsupportedModelError(f"the decoder's blocks of {type(model).__name__} take no {ENCODED}")
            encoded.append(call.pop(ENCODED).shape)
        if entry is not None and index == entry + 1:
            calls.append({})
        calls.append(call)
        return (hidden, *passed_on[key]) if returns[index].passes_on else hidden

    with _replaced(network, note):
        _run_blocks(network, model, ids)
    flow = StreamBatch(given, targets, shelf.keep(first[0], 0), calls, shelf)
    if entry is not None:
        flow.joint = JointState(entry, first[entry + 1].shape, encoded[0])
        flow.calls[entry] = {"enter": partial(_enter_decoder, network, ids, flow.joint)}
    return flow


def _enter_decoder(network: Network, ids: Tensor, joint: JointState, hidden: Tensor) -> Tensor:
    """Return the joint state before a decoder's blocks from the hidden states behind the encoder's, by the model."""
    found: list[Tensor] = []

    def pass_by(index: int, state: Tensor, call: dict[str, Any]) -> Tensor:
        if index == joint.entry + 1:
            found[:] = [state, call[ENCODED]]
        return hidden if index == 0 else state

    with _replaced(network, pass_by):
        _run_blocks(network, network.model, ids)
    decoder, encoder = found
    return joint.join(decoder, encoder)


def _first_blocks(network: Network) -> tuple[int, ...]:
    """Return the numbers of the first block of each list of blocks."""
    return (0,) if network.decoder_entry is None else (0, network.decoder_entry + 1)


def model_inputs(network: Network, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the model's inputs for token ids; a decoder that has an encoder predicts the same ids."""
    if network.decoder_entry is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": decoder_inputs(cast(PreTrainedModel, model), ids)}


def _run_blocks(network: Network, model: nn.Module, ids: Tensor) -> None:
    """Run all of the model except its head."""
    base = cast(nn.Module, model.base_model)
    with without_cache(model):
        base(**model_inputs(network, model, ids), **({} if network.kind == "encoder" else {"use_cache": False}))


def _first(result: Any) -> Tensor:
    return cast(Tensor, result[0] if isinstance(result, tuple | list) else result)


def _run_alone(network: Network, index: int, hidden: Tensor, call: dict[str, Any]) -> Any:
    """Return what block `index` returns, with its weights in memory."""
    with network.loaded(network.blocks[index]) as module:
        return type(module).forward(module, hidden, **call)


class _Output(Tensor):
    """A block's output that notes if the model takes its first element, as it does of a tuple."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # gives plain tensors
    block: int
    first_taken: set[int]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key == 0:
            self.first_taken.add(self.block)
            return self.as_subclass(Tensor)
        return super().__getitem__(key)


def _block_returns(network: Network, model: nn.Module, ids: Tensor) -> list[BlockReturns]:
    """Return the form of what each block returns; the first block of each list is loaded only if need be."""
    taken = set[int]()
    network.block_returns = [BlockReturns()] * len(network.blocks)

    def output(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        result = hidden.as_subclass(_Output)
        result.block, result.first_taken = index, taken
        return result

    try:
        with _replaced(network, output):
            _run_blocks(network, model, ids)
    except Exception:  # of any kind, where a model takes apart what is a tuple
        return _learn_returns(network, model, ids)
    return [BlockReturns(1 if index in taken else None) for index in range(len(network.blocks))]


def _learn_returns(network: Network, model: nn.Module, ids: Tensor) -> list[BlockReturns]:
    """Return the form of what each block returns, from a run of the first one of each list.

    Raises:
        UnsupportedModelError: blocks pass on other values than hidden states that follow from these.
    """
    forms: dict[int, BlockReturns] = {}  # by the first block of each list
    passed_on: dict[int, tuple[Any, ...]] = {}

    def run(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor | tuple[Any, ...]:
        begin = index if index in _first_blocks(network) else max(forms)
        if index == begin:
            result, other = (_run_alone(network, index, h, call) for h in (hidden, torch.randn_like(hidden)))
            forms[index] = BlockReturns()
            if isinstance(result, tuple | list):
                passed_on[index] = tuple(result[1:])
                forms[index] = BlockReturns(len(result), any(isinstance(value, Tensor) for value in result[1:]))
                if not _equal(passed_on[index], tuple(other[1:])):
                    raise UnsupportedModelError(f"the blocks of {type(model).__name__} pass on more than hidden states")
        return (hidden, *passed_on[begin]) if begin in passed_on else hidden

    with _replaced(network, run):
        _run_blocks(network, model, ids)
    return [forms[max(first for first in forms if first <= index)] for index in range(len(network.blocks))]


@contextmanager
def _replaced(network: Network, forward: Replacement) -> Iterator[None]:
    """Run `forward(index, hidden, keyword arguments)` in place of each block; the modules keep their attributes."""

    def call_instead(index: int, names: list[str], *positional: Any, **call: Any) -> Any:
        call = {**dict(zip(names, positional, strict=False)), **call}
        hidden = call.pop(names[0])
        result = forward(index, hidden, call)
        count = None if network.block_returns is None else network.block_returns[index].count
        return result if count is None or isinstance(result, tuple | list) else (result, *[None] * (count - 1))

    modules = {index: block for index, block in enumerate(network.blocks) if index != network.decoder_entry}
    for index, block in modules.items():
        names = list(inspect.signature(type(block.module).forward).parameters)[1:]
        block.module.forward = partial(call_instead, index, names)
    try:
        yield
    finally:
        for block in modules.values():
            del block.module.forward


def _reuse(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Return `new` with equal values replaced by those of `old`, so that masks and rotations are stored once."""
    return {key: old[key] if key in old and _equal(value, old[key]) else value for key, value in new.items()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a is b
