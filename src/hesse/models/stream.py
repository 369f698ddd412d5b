"""Calibration data as it flows through a network, block after block."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from hesse.errors import DataError, UnsupportedModelError
from hesse.models.network import Block, Layer, Network

BATCH_TOKENS = 2048  # few enough to stay in the caches of a CPU, enough to keep its products large


@dataclass(eq=False)
class Flow:
    """One batch of samples on its way: token ids, hidden states, and what else each block is called with."""

    ids: Tensor  # (samples, tokens)
    hidden: Tensor  # (samples, tokens, width)
    calls: list[dict[str, Any]]  # keyword arguments, one dictionary a block

    def through(self, module: nn.Module, index: int) -> Tensor:
        """The output (samples, tokens, width) of block number `index`, which is `module`."""
        result = module(self.hidden, **self.calls[index])
        hidden: Tensor = result[0] if isinstance(result, tuple) else result
        return hidden


def calibration_batch(length: int) -> int:
    """Samples of `length` tokens that go through the network together."""
    return max(BATCH_TOKENS // length, 1)


def start(network: Network, batches: Iterable[Tensor]) -> list[Flow]:
    """What reaches the first block for each batch of token ids (samples, tokens), and the blocks' other arguments."""
    flows: list[Flow] = []
    with network.surroundings() as model, torch.no_grad():
        for ids in batches:
            flow = _record(network, model, ids.to(network.device))
            if flows:
                flow.calls = [_reuse(new, old) for new, old in zip(flow.calls, flows[-1].calls, strict=True)]
            flows.append(flow)
    return flows


def finish(network: Network, model: nn.Module, flow: Flow) -> Tensor:
    """What the model makes of hidden states that have passed all blocks, by its own forward.

    Logits (samples, tokens, vocabulary), or an encoder's last hidden states (samples, tokens, width). `model` is what
    `network.surroundings()` gave.
    """

    def inject(index: int, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        return flow.hidden if index == 0 else hidden

    with _replaced(network, inject):
        if network.kind == "encoder":
            result = model.base_model(input_ids=flow.ids).last_hidden_state  # type: ignore[operator]
        else:
            result = model(input_ids=flow.ids, use_cache=False).logits
    assert isinstance(result, Tensor)
    return result


def advance(flows: Iterable[Flow], module: nn.Module, index: int) -> None:
    """Take all flows through block number `index`."""
    with torch.no_grad():
        for flow in flows:
            flow.hidden = flow.through(module, index)


def check_finite(flows: Iterable[Flow], block: str) -> None:
    """Raise DataError if what came out of `block` is not finite."""
    if not all(bool(torch.isfinite(flow.hidden).all()) for flow in flows):
        raise DataError(
            f"the output of {block} holds NaN or infinity: the model overflows on this data, or its weights are damaged"
        )


def advance_with_stops(
    flows: list[Flow],
    block: Block,
    index: int,
    collect: Callable[[Layer, Tensor], None],
    change: Callable[[Layer], None],
) -> list[Layer]:
    """Take all flows through a block, and stop all of them at each linear layer, so that it can be changed.

    For each layer, in the order in which the block calls them, `collect(layer, inputs)` is called with every flow's
    inputs (..., in) and then `change(layer)` once; the flows go on through the changed layer. So each layer sees
    inputs made by all changes before it, and each layer is run only once. A layer whose input is the very tensor of
    the layer before it (keys and values after queries) is changed without a `collect` of its own. Memory: what each
    flow holds between two layers, for all flows at once.

    Returns the layers that were never called.
    """
    changed: set[str] = set()
    seen: dict[greenlet, Tensor] = {}

    def stop(layer: Layer, linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if layer.name in changed:
            return
        runner, inputs = getcurrent(), arguments[0]
        if seen.get(runner) is inputs:
            change(layer)
            changed.add(layer.name)
            return
        seen[runner] = inputs
        collect(layer, inputs)
        assert runner.parent is not None
        runner.parent.switch(layer)

    hooks = [layer.module.register_forward_pre_hook(partial(stop, layer)) for layer in block.layers]
    try:
        with torch.inference_mode():  # a sweep over columns is a tenth faster than with no_grad
            runners = [greenlet(partial(flow.through, block.module, index)) for flow in flows]
            while not all(runner.dead for runner in runners):
                arrived = [runner.switch() for runner in runners]
                if all(runner.dead for runner in runners):
                    for flow, hidden in zip(flows, arrived, strict=True):
                        flow.hidden = hidden
                elif any(layer is not arrived[0] for layer in arrived):
                    raise UnsupportedModelError(f"{block.name} calls its layers in an order that depends on the data")
                else:
                    change(arrived[0])
                    changed.add(arrived[0].name)
    finally:
        for hook in hooks:
            hook.remove()
        seen.clear()
    return [layer for layer in block.layers if layer.name not in changed]


class _WrongReturn(Exception):
    """The model takes the first element of what a block returns, so blocks return tuples."""


def _record(network: Network, model: nn.Module, ids: Tensor) -> Flow:
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
        return _record(network, model, ids)
    return Flow(ids, first[0], calls)


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
