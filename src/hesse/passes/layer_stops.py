"""Several runs of one module that all stop at each of its layers, so that the layer can be changed there.

Each run is a greenlet: a function that can be left in the middle, here inside a layer's forward hook, and be resumed
later. CONTRIBUTING.md explains how several batches wait at one layer.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from hesse.errors import UnsupportedModelError
from hesse.networks.network import Block, Layer
from hesse.passes.activation_offload import OffloadToDisk

InputKey = tuple[object, ...]  # identifies a layer's input: equal for layers whose inputs are the same rows


def layer_stops(
    runs: Sequence[Callable[[], None]],
    block: Block,
    collect: Callable[[Layer, int, Tensor], None],
    offload: OffloadToDisk | None = None,
    gradients_off: Callable[[], AbstractContextManager[object]] = torch.inference_mode,
) -> Generator[Layer, None, None]:
    """Take all `runs` of a block's module through it; yield each layer once, while all of them wait at it.

    The consumer may replace the layer's weight before it asks for the next layer: the runs go on through the changed
    layer. So each layer's inputs are made by all changes before it, and each layer is run only once. Layers come in the
    order in which the runs call them; layers that are never called are not yielded. `collect(layer, number, inputs)` is
    called with the inputs of each run before its activations are offloaded. A layer whose input is the very tensor of
    the layer before it (keys and values after queries) is yielded without a `collect` of its own.

    All runs hold their activations while they wait, unless `offload` writes them to disk. The runs
    are inside `gradients_off()`, the consumer is not. The hooks are removed when the consumer stops early.

    Raises:
        UnsupportedModelError: the runs differ in the order of their layers.
    """
    done: set[str] = set()  # layers that the consumer has seen
    last_inputs: dict[greenlet, InputKey] = {}

    def stop(layer: Layer, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Leave the run's greenlet, and pass the layer and, if they are new, its inputs to the loop below."""
        if layer.name not in done:
            runner, key = getcurrent(), _input_key(module, arguments[0])
            new = not _same(last_inputs.get(runner, ()), key)
            last_inputs[runner] = key
            assert runner.parent is not None
            runner.parent.switch((layer, arguments[0] if new else None))

    hooks = [layer.module.register_forward_pre_hook(partial(stop, layer)) for layer in block.layers]
    try:
        runners = [greenlet(run) for run in runs]
        while not all(runner.dead for runner in runners):
            arrived: list[Layer | None] = []
            for number, runner in enumerate(runners):
                while True:
                    with gradients_off():
                        stopped = runner.switch() if offload is None else offload.resume(runner)
                    layer, inputs = (None, None) if stopped is None else stopped
                    if layer is None or inputs is not None:
                        break
                    yield layer
                    done.add(layer.name)
                if layer is not None and inputs is not None:
                    with torch.no_grad():
                        collect(layer, number, inputs)
                    del inputs, stopped
                if offload is not None:
                    offload.put_away(runner)
                arrived.append(layer)
            if any(layer is not arrived[0] for layer in arrived):
                raise UnsupportedModelError(f"{block.name} calls its layers in an order that depends on the data")
            if arrived[0] is not None:
                yield arrived[0]
                done.add(arrived[0].name)
    finally:
        for hook in hooks:
            hook.remove()
        last_inputs.clear()


def _input_key(module: nn.Module, inputs: Tensor) -> InputKey:
    """Return the tensor, how often it was changed in place, and which patches of it the layer takes."""
    version = None if inputs.is_inference() else inputs._version
    return inputs, version, patching(module)


def patching(module: nn.Module) -> InputKey:
    """Return which patches a convolution takes of its input: with equal ones, layers get the same rows of a tensor."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode
    return ()


def _same(before: InputKey, now: InputKey) -> bool:
    return bool(before) and before[0] is now[0] and before[1:] == now[1:]
