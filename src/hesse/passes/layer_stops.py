"""Several runs of one module, all of which stop at each of its layers, so that the layer can be changed there."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from hesse.errors import UnsupportedModelError
from hesse.networks.network import Block, Layer
from hesse.passes.activation_offload import Pauses

InputKey = tuple[object, ...]  # what a layer sees: the same for layers whose inputs are the same rows


def stop_at_layers(
    runs: Sequence[Callable[[], None]],
    block: Block,
    collect: Callable[[Layer, Tensor], None],
    change: Callable[[Layer], None],
    pauses: Pauses,
) -> list[Layer]:
    """Take all `runs` of a block's module through it, and stop all of them at each of its layers.

    For each layer, in the order in which the runs call them, `collect(layer, inputs)` is called with every run's
    inputs and then `change(layer)` once; the runs go on through the changed layer. So each layer sees inputs made by
    all changes before it, and each layer is run only once. A layer whose input is the very tensor of the layer before
    it (keys and values after queries) is changed without a `collect` of its own. Memory: what each run holds between
    two layers, for all runs at once, unless `pauses` put it away.

    Returns the layers that were never called.

    Raises:
        UnsupportedModelError: the runs differ in the order of their layers.
    """
    changed: set[str] = set()
    seen: dict[greenlet, InputKey] = {}

    def stop(layer: Layer, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if layer.name not in changed:
            runner, inputs = getcurrent(), arguments[0]
            sight = _sight(module, inputs)
            again = _same(seen.get(runner, ()), sight)
            seen[runner] = sight
            assert runner.parent is not None
            runner.parent.switch((layer, None if again else inputs))

    def changing(layer: Layer) -> None:
        change(layer)
        changed.add(layer.name)

    def next_stop(runner: greenlet) -> Layer | None:
        """Take a run to the next layer with inputs of its own, or to its end."""
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
        runners = [greenlet(run) for run in runs]
        while not all(runner.dead for runner in runners):
            arrived = [next_stop(runner) for runner in runners]
            if any(layer is not arrived[0] for layer in arrived):
                raise UnsupportedModelError(f"{block.name} calls its layers in an order that depends on the data")
            if arrived[0] is not None:
                changing(arrived[0])
    finally:
        for hook in hooks:
            hook.remove()
        seen.clear()
    return [layer for layer in block.layers if layer.name not in changed]


def _sight(module: nn.Module, inputs: Tensor) -> InputKey:
    """The tensor, how often it was changed in place, and what patches of it the layer takes."""
    version = None if inputs.is_inference() else inputs._version
    return inputs, version, patching(module)


def patching(module: nn.Module) -> InputKey:
    """What patches a convolution takes of its input: layers with the same see the same rows of the same tensor."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode
    return ()


def _same(before: InputKey, now: InputKey) -> bool:
    return bool(before) and before[0] is now[0] and before[1:] == now[1:]
