"""Blocks with their weights in memory, one after another."""

from collections.abc import Iterable, Iterator

from hesse.networks.network import Block, Blocks


def each_loaded(network: Blocks, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, Block]]:
    """Yield each block of a network with its number, its weights in memory until the next is asked for.

    `numbers` choose other blocks than all of them in order.
    """
    for number in range(len(network.blocks)) if numbers is None else numbers:
        with network.loaded(network.blocks[number]):
            yield number, network.blocks[number]
