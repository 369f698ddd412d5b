"""Stream calibration data through a network, block after block."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from hesse.checkpoints.tensor_store import StoredTensor, TensorStore
from hesse.curvature.losses import hide_from_loss, input_ids, next_tokens
from hesse.errors import DataError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.networks.layout import vocabulary
from hesse.networks.network import Network
from hesse.networks.towers import without_cache

LOGITS_LIMIT = 1 << 25  # of a batch that is evaluated
BATCH_TOKENS = 2048  # small enough for the caches of a CPU, large enough for efficient products


class CalibrationBatch(Protocol):
    """One batch of samples that calibration passes through a network's blocks."""

    def pass_block(self, module: nn.Module, index: int) -> None:
        """Run block number `index`, which is `module`, on the hidden states; keep its output for the next block."""

    def arguments(self, index: int) -> Any:
        """Return the other arguments of block number `index`, whose tensors several batches may share."""


@dataclass(eq=False)
class StreamBatch:
    """One batch of samples between two blocks: token ids, hidden states, and the other arguments of each block."""

    ids: Tensor  # (samples, tokens)
    targets: Tensor  # (samples, tokens): the token after each, or -100 where none is scored
    waiting: StoredTensor  # the hidden states
    calls: list[dict[str, Any]]  # keyword arguments, one dictionary per block
    shelf: TensorStore  # where hidden states wait between two blocks
    step: int = 0  # number of blocks passed

    @property
    def samples(self) -> Tensor:
        """Return the ids as `start` takes them, with the tokens hidden that are not scored."""
        scored = torch.ones_like(self.ids, dtype=torch.bool)
        scored[:, 1:] = self.targets[:, :-1] >= 0
        return hide_from_loss(self.ids, scored)

    @property
    def hidden(self) -> Tensor:
        """Return the hidden states (samples, tokens, width) from the store."""
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
        result = module(self.hidden if hidden is None else hidden, **self.calls[index])
        return cast(Tensor, result[0] if isinstance(result, tuple) else result)


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
    with network.surroundings() as model, torch.no_grad():
        for ids in batches:
            flow = _record(network, model, ids.to(network.device), shelf)
            if flows:
                flow.calls = [_reuse(new, old) for new, old in zip(flow.calls, flows[-1].calls, strict=True)]
            flows.append(flow)
    return flows


def finish(network: Network, model: nn.Module, flow: StreamBatch, hidden: Tensor | None = None) -> Tensor:
    """Compute the model's output from a flow's hidden states, or `hidden`, after all blocks, by its own forward.

    The output is logits (samples, tokens, vocabulary), or an encoder's last hidden states (samples, tokens, width).
    `model` is the model yielded by `network.surroundings()`.
    """
    passed = flow.hidden if hidden is None else hidden

    def inject(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        return passed if index == 0 else hidden

    with _replaced(network, inject), without_cache(model):
        if network.kind == "encoder":
            result = model.base_model(input_ids=flow.ids).last_hidden_state  # type: ignore[operator]
        else:
            result = model(input_ids=flow.ids, use_cache=False).logits
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


def _record(network: Network, model: nn.Module, ids: Tensor, shelf: TensorStore) -> StreamBatch:
    """Run the model with blocks that return their input, and record the arguments of each block."""
    if network.blocks_return_tuples is None:
        network.blocks_return_tuples = _takes_first_elements(network, model, input_ids(ids[:1]))
    calls: list[dict[str, Any]] = []
    first: list[Tensor] = []

    def note(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        if index == 0:
            calls.clear()
            first[:] = [hidden]
        elif hidden.shape != first[0].shape:
            raise UnsupportedModelError(f"the blocks of {type(model).__name__} change the shape of their input")
        calls.append(call)
        return hidden

    targets, ids = next_tokens(ids), input_ids(ids)
    with _replaced(network, note):
        _run_blocks(network, model, ids)
    return StreamBatch(ids, targets, shelf.keep(first[0], 0), calls, shelf)


def _run_blocks(network: Network, model: nn.Module, ids: Tensor) -> None:
    """Run all of the model except its head."""
    base = cast(nn.Module, model.base_model)
    with without_cache(model):
        base(input_ids=ids, **({"use_cache": False} if network.kind == "causal-lm" else {}))


class _Output(Tensor):
    """A block's output that notes if the model takes its first element, as it does of a tuple."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # gives plain tensors
    first_taken: list[bool]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key == 0:
            self.first_taken.append(True)
            return self.as_subclass(Tensor)
        return super().__getitem__(key)


def _takes_first_elements(network: Network, model: nn.Module, ids: Tensor) -> bool:
    """True if the model takes the first element of what a block returns, so that its blocks have to return tuples."""
    first_taken: list[bool] = []

    def output(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        result = hidden.as_subclass(_Output)
        result.first_taken = first_taken
        return result

    with _replaced(network, output):
        _run_blocks(network, model, ids)
    return bool(first_taken)


@contextmanager
def _replaced(network: Network, forward: Callable[[int, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
    """Run `forward(index, hidden, keyword arguments)` in place of each block; the modules keep their attributes."""

    def call_instead(index: int, names: list[str], *positional: Any, **call: Any) -> Any:
        call = {**dict(zip(names, positional, strict=False)), **call}
        hidden = call.pop(names[0])
        result = forward(index, hidden, call)
        return (result,) if network.blocks_return_tuples else result

    for index, block in enumerate(network.blocks):
        names = list(inspect.signature(type(block.module).forward).parameters)[1:]
        block.module.forward = partial(call_instead, index, names)
    try:
        yield
    finally:
        for block in network.blocks:
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
