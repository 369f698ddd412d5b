"""Collect the inputs of each stream's readers in one pass through a network."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hesse.networks.network import Block, Network, each_loaded
from hesse.passes.stream import StreamBatch, advance
from hesse.rewriting.streams import BlockStreams, Streams


class StreamInputs:
    """Inputs of a stream's readers: the peak and mean square of each input, and every n-th token.

    `peak` and `square` are (inputs,), `sampled` is (tokens, inputs); all are float32.
    """

    def __init__(self, every: int) -> None:
        self.tokens = 0
        self._every, self._kept = every, list[Tensor]()
        self.peak, self._squares = torch.zeros(()), torch.zeros(())

    def add(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Add the inputs of a layer; usable as a forward pre-hook."""
        flat = arguments[0].detach().float().flatten(0, -2).cpu()
        self.peak = torch.maximum(self.peak, flat.abs().amax(0))
        self._squares = self._squares + flat.square().sum(0)
        self._kept.append(flat[-self.tokens % self._every :: self._every].clone())
        self.tokens += len(flat)

    @property
    def square(self) -> Tensor:
        """Return E[x²] of each input."""
        return self._squares / self.tokens

    @property
    def sampled(self) -> Tensor:
        """Return the sampled tokens."""
        return torch.cat(self._kept)


def stream_inputs(
    network: Network, streams: Streams, flows: list[StreamBatch], every: int
) -> Iterator[tuple[Block, BlockStreams, dict[str, StreamInputs]]]:
    """Yield each block, loaded, with its streams and their readers' inputs by stream name; see `StreamInputs`."""
    for index, block in each_loaded(network):
        block_streams = streams.blocks[index]
        inputs = {stream.name: StreamInputs(every) for stream in block_streams.all}
        layers = {layer.name: layer.module for layer in block.layers}
        hooks = [
            layers[stream.layers[0]].register_forward_pre_hook(inputs[stream.name].add) for stream in block_streams.all
        ]
        try:
            advance(flows, block.module, index, block.name)
        finally:
            for hook in hooks:
                hook.remove()
        yield block, block_streams, inputs
