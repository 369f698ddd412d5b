"""One walk through a network that shows what the readers of each stream are given."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hesse.networks.network import Block, Network
from hesse.passes.stream import StreamBatch, advance
from hesse.rewriting.streams import BlockStreams, Streams


class Inputs:
    """What reached the readers of a stream: the largest and the mean square of each input, and every so manieth token.

    `peak` and `square` are (inputs,), `some` (tokens, inputs), in float32.
    """

    def __init__(self, every: int) -> None:
        self.tokens = 0
        self._every, self._kept = every, list[Tensor]()
        self.peak, self._squares = torch.zeros(()), torch.zeros(())

    def add(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Add the inputs of a layer, as a hook before its forward gets them."""
        flat = arguments[0].detach().float().flatten(0, -2).cpu()
        self.peak = torch.maximum(self.peak, flat.abs().amax(0))
        self._squares = self._squares + flat.square().sum(0)
        self._kept.append(flat[-self.tokens % self._every :: self._every].clone())
        self.tokens += len(flat)

    @property
    def square(self) -> Tensor:
        """E[x²] of each input."""
        return self._squares / self.tokens

    @property
    def some(self) -> Tensor:
        """The tokens that were kept."""
        return torch.cat(self._kept)


def walk(
    network: Network, streams: Streams, flows: list[StreamBatch], every: int
) -> Iterator[tuple[Block, BlockStreams, dict[str, Inputs]]]:
    """Each block, in memory, with its streams and by their names what their readers were given; `every` as `Inputs`."""
    for index, (block, own) in enumerate(zip(network.blocks, streams.blocks, strict=True)):
        with network.loaded(block) as module:
            found = {stream.name: Inputs(every) for stream in own.all}
            layers = {layer.name: layer.module for layer in block.layers}
            hooks = [layers[stream.layers[0]].register_forward_pre_hook(found[stream.name].add) for stream in own.all]
            try:
                advance(flows, module, index, block.name)
            finally:
                for hook in hooks:
                    hook.remove()
            yield block, own, found
