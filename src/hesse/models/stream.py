"""Calibration data as it flows through a network, block after block."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hesse.errors import DataError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.models.network import Block, Layer, Network
from hesse.models.pausing import Pauses, pauses_in
from hesse.models.shelf import Shelf, Waiting

BATCH_TOKENS = 2048  # few enough to stay in the caches of a CPU, enough to keep its products large


@dataclass(eq=False)
class Flow:
    """One batch of samples on its way: token ids, hidden states, and what else each block is called with."""

    ids: Tensor  # (samples, tokens)
    waiting: Waiting  # the hidden states
    calls: list[dict[str, Any]]  # keyword arguments, one dictionary a block
    shelf: Shelf  # where hidden states wait between two blocks
    step: int = 0  # how often they changed

    @property
    def hidden(self) -> Tensor:
        """Hidden states (samples, tokens, width), from where they wait."""
        return self.waiting.tensor()

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self.step += 1
        self.waiting = self.shelf.keep(hidden, self.step)

    def through(self, module: nn.Module, index: int, hidden: Tensor | None = None) -> Tensor:
        """The output (samples, tokens, width) of block number `index`, which is `module`, for its hidden states."""
        result = module(self.hidden if hidden is None else hidden, **self.calls[index])
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output


def calibration_batch(length: int) -> int:
    """Samples of `length` tokens that go through the network together."""
    return max(BATCH_TOKENS // length, 1)


def start(network: Network, batches: Iterable[Tensor], shelf: Shelf | None = None) -> list[Flow]:
    """What reaches the first block for each batch of token ids (samples, tokens), and the blocks' other arguments.

    Hidden states wait on `shelf`, or in memory.
    """
    flows: list[Flow] = []
    shelf = Shelf() if shelf is None else shelf
    with network.surroundings() as model, torch.no_grad():
        for ids in batches:
            flow = _record(network, model, ids.to(network.device), shelf)
            if flows:
                flow.calls = [_reuse(new, old) for new, old in zip(flow.calls, flows[-1].calls, strict=True)]
            flows.append(flow)
    return flows


def finish(network: Network, model: nn.Module, flow: Flow, hidden: Tensor | None = None) -> Tensor:
    """What the model makes of a flow's hidden states, or of `hidden`, that have passed all blocks, by its own forward.

    Logits (samples, tokens, vocabulary), or an encoder's last hidden states (samples, tokens, width). `model` is what
    `network.surroundings()` gave.
    """
    passed = flow.hidden if hidden is None else hidden

    def inject(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        return passed if index == 0 else hidden

    with _replaced(network, inject):
        if network.kind == "encoder":
            result = model.base_model(input_ids=flow.ids).last_hidden_state  # type: ignore[operator]
        else:
            result = model(input_ids=flow.ids, use_cache=False).logits
    assert isinstance(result, Tensor)
    return result


def advance(flows: Iterable[Flow], module: nn.Module, index: int, block: str | None = None) -> None:
    """Take all flows through block number `index`; with its name `block`, see to it that what comes out is finite.

    Raises:
        DataError: it is not.
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


def take_up(flows: Iterable[Flow], waiting: Iterable[Waiting], step: int) -> None:
    """Put flows where they were after so many blocks, with what waits of them."""
    for flow, hidden in zip(flows, waiting, strict=True):
        flow.waiting, flow.step = hidden, step


def advance_with_stops(
    flows: list[Flow],
    block: Block,
    index: int,
    collect: Callable[[Layer, Tensor], None],
    change: Callable[[Layer], None],
    paused: Path | None = None,
) -> list[Layer]:
    """Take all flows through a block, and stop all of them at each linear layer, so that it can be changed.

    For each layer, in the order in which the block calls them, `collect(layer, inputs)` is called with every flow's
    inputs (..., in) and then `change(layer)` once; the flows go on through the changed layer. So each layer sees
    inputs made by all changes before it, and each layer is run only once. A layer whose input is the very tensor of
    the layer before it (keys and values after queries) is changed without a `collect` of its own. Memory: what each
    flow holds between two layers, for all flows at once; with a folder `paused` for one, while the others' is there.

    Returns the layers that were never called.
    """
    changed: set[str] = set()
    seen: dict[greenlet, Tensor] = {}

    def stop(layer: Layer, linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if layer.name not in changed:
            runner, inputs = getcurrent(), arguments[0]
            again = seen.get(runner) is inputs
            seen[runner] = inputs
            assert runner.parent is not None
            runner.parent.switch((layer, None if again else inputs))

    def run(flow: Flow) -> None:
        flow.hidden = flow.through(block.module, index)

    def shared() -> Iterator[Tensor]:
        yield from (*block.module.parameters(), *block.module.buffers())
        yield from (leaf for flow in flows for leaf in tree_leaves(flow.calls[index]) if isinstance(leaf, Tensor))

    def changing(layer: Layer) -> None:
        change(layer)
        changed.add(layer.name)

    def next_stop(runner: greenlet, pauses: Pauses) -> Layer | None:
        """Take a flow to the next layer with inputs of its own, or to its end."""
        pauses.bring_back(runner)
        while (said := runner.switch()) is not None:
            layer, inputs = said
            if inputs is not None:
                collect(layer, inputs)
                pauses.put_away(runner)
                return cast(Layer, layer)
            changing(layer)
        pauses.put_away(runner)
        return None

    hooks = [layer.module.register_forward_pre_hook(partial(stop, layer)) for layer in block.layers]
    try:
        with torch.inference_mode(), pauses_in(paused, shared) as pauses:  # a tenth faster than with no_grad
            runners = [greenlet(partial(run, flow)) for flow in flows]
            while not all(runner.dead for runner in runners):
                arrived = [next_stop(runner, pauses) for runner in runners]
                if any(layer is not arrived[0] for layer in arrived):
                    raise UnsupportedModelError(f"{block.name} calls its layers in an order that depends on the data")
                if arrived[0] is not None:
                    changing(arrived[0])
    finally:
        for hook in hooks:
            hook.remove()
        seen.clear()
    return [layer for layer in block.layers if layer.name not in changed]


class _WrongReturn(Exception):
    """The model takes the first element of what a block returns, so blocks return tuples."""


def _record(network: Network, model: nn.Module, ids: Tensor, shelf: Shelf) -> Flow:
    """Run the model with each block letting its input through, and note what each is called with."""
    calls: list[dict[str, Any]] = []
    first: list[Tensor] = []

    def note(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        if index == 0:
            calls.clear()
            first[:] = [hidden]
        elif hidden.shape != first[0].shape:
            raise _WrongReturn
        calls.append(call)
        return hidden

    base = model.base_model
    assert isinstance(base, nn.Module)
    arguments = {"use_cache": False} if network.kind == "causal-lm" else {}
    try:
        with _replaced(network, note):
            base(input_ids=ids, **arguments)
    except (_WrongReturn, IndexError):
        if network.blocks_return_tuples:
            name = type(model).__name__
            raise UnsupportedModelError(f"the blocks of {name} change the shape of their input") from None
        network.blocks_return_tuples = True
        return _record(network, model, ids, shelf)
    return Flow(ids, shelf.keep(first[0], 0), calls, shelf)


@contextmanager
def _replaced(network: Network, forward: Callable[[int, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
    """Let `forward(index, hidden, keyword arguments)` stand in for each block; the modules keep their attributes."""

    def stand_in(index: int, names: list[str], *positional: Any, **call: Any) -> Any:
        call = {**dict(zip(names, positional, strict=False)), **call}
        hidden = call.pop(names[0])
        result = forward(index, hidden, call)
        return (result,) if network.blocks_return_tuples else result

    for index, block in enumerate(network.blocks):
        names = list(inspect.signature(type(block.module).forward).parameters)[1:]
        block.module.forward = partial(stand_in, index, names)
    try:
        yield
    finally:
        for block in network.blocks:
            del block.module.forward


def _reuse(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """`new` with the values of `old` in place of equal ones, so that masks and rotations are kept once."""
    return {key: old[key] if key in old and _equal(value, old[key]) else value for key, value in new.items()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a is b
