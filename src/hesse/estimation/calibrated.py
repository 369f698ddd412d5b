"""Forward calibration: batches stop at each layer, where its statistics are known and its weight can be changed."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import tree_leaves

from hesse.curvature import Gram
from hesse.estimation.statistics import STATISTICS, BlockStatistic, InputStatistic, Needs
from hesse.estimation.statistics.base import InputAccumulator
from hesse.estimation.statistics.inputs import input_gram
from hesse.estimation.statistics_folder import Statistics
from hesse.networks.network import Block, Blocks, Layer, each_loaded
from hesse.passes.activation_offload import OffloadToDisk
from hesse.passes.layer_stops import layer_stops
from hesse.passes.parts import seen_by
from hesse.passes.stream import CalibrationBatch
from hesse.processes import ALONE, Processes
from hesse.progress import Clock

StatisticReaders = dict[str, Callable[[], Any]]  # by name: what reads a statistic of a layer that was collected before
KnownStatistics = Mapping[str, StatisticReaders]  # by layer


class LayerStatistics(Mapping[str, Any]):
    """Statistics of one layer by name; unknown ones are absent.

    `called` is False for a layer that the batches never called; its "inputs" are then a Gram of no tokens. Values of
    `known`, which were collected before, are read from their place on each access.
    """

    def __init__(self, values: Mapping[str, Any], known: StatisticReaders | None = None, called: bool = True) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._known, self.called = known or {}, called

    @property
    def gram(self) -> Gram:
        """Return the Gram of the layer's inputs: one object for all layers with the same inputs."""
        return cast(Gram, self._values["inputs"])

    def __getitem__(self, name: str) -> Any:
        return self._values[name] if name in self._values else self._known[name]()

    def __iter__(self) -> Iterator[str]:
        return iter({**self._values, **self._known})

    def __len__(self) -> int:
        return len({**self._values, **self._known})


Layers = Generator[tuple[Layer, LayerStatistics], None, None]


def calibrated_blocks(
    network: Blocks,
    batches: Sequence[CalibrationBatch],
    needs: Needs,
    *,
    known: KnownStatistics = MappingProxyType({}),
    first: int = 0,
    clock: Clock | None = None,
    processes: Processes = ALONE,
    offload: Path | None = None,
) -> Iterator[tuple[Block, Layers]]:
    """Pass `batches` through a network; yield each block, with weights in memory, and its layers with their statistics.

    At each layer all batches wait, so that the consumer may replace its weight before it asks for the next one: the
    batches go on through the changed layer, and later layers' statistics are of what it gives. Layers come in the order
    in which the block calls them, and then those that it never called. After the last one the batches have passed the
    block; layers that the consumer does not ask for are passed unchanged. A layer's statistics are those that any layer
    of its block needs, and layers with the same inputs share them; a block whose layers need none is only run.

    Args:
        network: the blocks, in the type that the batches are in.
        batches: hidden states before block number `first`; afterwards, behind the last block.
        needs: the statistics of each layer that needs some; backward statistics among them are not collected here.
        known: statistics that were collected before, such as those of `probe`.
        first: the number of the first block.
        clock: charged with "read", "calibrate" (forward) and "estimate" (statistics).
        processes: each takes batches of its own; the statistics are of the batches of all.
        offload: a folder for the activations of batches that wait inside a block; None keeps them in memory.

    Raises:
        UnsupportedModelError: the batches differ in the order in which they call a block's layers.
        DataError: a layer's inputs hold NaN or infinity.
    """
    clock = Clock() if clock is None else clock
    with clock.phase("read"):
        for index, block in each_loaded(network, range(first, len(network.blocks))):
            names = sorted({name for layer in block.layers for name in needs.get(layer.name, ())})
            layers = _layers(network, batches, index, block, names, known, clock, processes, offload)
            with clock.phase("calibrate"), closing(layers):
                yield block, layers
                for _ in layers:
                    pass


def stored_blocks(
    network: Blocks, folder: Statistics, needs: Needs, *, first: int = 0, clock: Clock | None = None
) -> Iterator[tuple[Block, Layers]]:
    """Yield blocks as `calibrated_blocks` does, with the unchanged model's statistics from a folder instead of batches.

    Only layers that need some are yielded, in the order of the block; those that no sample reached come last.
    """
    clock = Clock() if clock is None else clock
    with clock.phase("read"):
        for _, block in each_loaded(network, range(first, len(network.blocks))):
            layers = _stored_layers([layer for layer in block.layers if layer.name in needs], folder, needs, clock)
            with closing(layers):
                yield block, layers


def calibrated(
    network: Blocks, batches: Sequence[CalibrationBatch], needs: Needs, **settings: Any
) -> Iterator[tuple[Block, Layer, LayerStatistics]]:
    """Yield the layers of `calibrated_blocks`, whose arguments it takes, one after another with their blocks."""
    for block, layers in calibrated_blocks(network, batches, needs, **settings):
        for layer, statistics in layers:
            yield block, layer, statistics


def no_inputs(layer: Layer) -> Gram:
    """Return the Gram of a layer that no sample reached."""
    return input_gram(layer).gram()


def _layers(
    network: Blocks,
    batches: Sequence[CalibrationBatch],
    index: int,
    block: Block,
    names: Collection[str],
    known: KnownStatistics,
    clock: Clock,
    processes: Processes,
    offload: Path | None,
) -> Layers:
    """Pass batches through one loaded block; yield its layers with the statistics in `names`."""

    def run(batch: CalibrationBatch) -> None:
        batch.pass_block(block.module, index)

    def shared() -> Iterator[Tensor]:
        yield from (*block.module.parameters(), *block.module.buffers())
        yield from (
            leaf for batch in batches for leaf in tree_leaves(batch.arguments(index)) if isinstance(leaf, Tensor)
        )

    collection = ForwardCollection(names, batches, block, index, clock, processes)
    called: set[Layer] = set()
    runs = [partial(run, batch) for batch in batches]
    disk = None if offload is None else OffloadToDisk(offload, shared)
    stopping = layer_stops(runs, block, collection.collect, disk, network.gradients_off)
    with closing(stopping) as stops:
        for layer in stops:
            called.add(layer)
            values = {**collection.input_values(), **collection.block_values(layer)}
            yield layer, LayerStatistics(values, known.get(layer.name))
    for layer in block.layers:
        if layer not in called:
            values = {"inputs": no_inputs(layer), **collection.block_values(layer)}
            yield layer, LayerStatistics(values, known.get(layer.name), called=False)


def _stored_layers(layers: Sequence[Layer], folder: Statistics, needs: Needs, clock: Clock) -> Layers:
    missing = []
    for layer in layers:
        device = layer.weight.device
        readers = {name: partial(STATISTICS[name].load, folder, layer, device) for name in needs[layer.name]}
        with clock.phase("estimate"):
            stored: StatisticReaders = {name: read for name, read in readers.items() if read() is not None}
            gram = folder.gram(layer.name, device) if "inputs" in stored else None
        if gram is None:
            missing.append((layer, stored))
        else:
            yield layer, LayerStatistics({"inputs": gram}, stored)
    for layer, stored in missing:
        yield layer, LayerStatistics({"inputs": no_inputs(layer)}, stored, called=False)


class ForwardCollection:
    """Statistics of the layers of a block: those of the block as a whole, and those of the last inputs collected.

    Layers with the same inputs come one after another, so that only the inputs of one layer are in memory.
    """

    def __init__(
        self,
        names: Collection[str],
        batches: Sequence[CalibrationBatch],
        block: Block,
        index: int,
        clock: Clock,
        processes: Processes = ALONE,
    ) -> None:
        self._statistics = [s for name in names if isinstance(s := STATISTICS[name], InputStatistic)]
        self._clock, self._processes = clock, processes
        with clock.phase("estimate"):
            self._prepared = {s.name: s.prepare(batches, block, index) for s in self._statistics}
            self._of_block = {
                name: statistic.values(batches, block, index, processes)
                for name in names
                if isinstance(statistic := STATISTICS[name], BlockStatistic)
            }
        self._layer: Layer | None = None  # where inputs were collected last
        self._sums: dict[str, InputAccumulator] = {}
        self._values: dict[str, Any] = {}

    def collect(self, layer: Layer, number: int, inputs: Tensor) -> None:
        """Add the inputs of a layer from batch `number`."""
        with self._clock.phase("estimate"):
            if layer is not self._layer:
                self._layer, self._values = layer, {}
                made = {s.name: s.accumulator(layer, self._prepared[s.name]) for s in self._statistics}
                self._sums = {name: sums for name, sums in made.items() if sums is not None}
            rows = seen_by(layer.module, inputs)
            for sums in self._sums.values():
                sums.add(rows, number)

    def input_values(self) -> dict[str, Any]:
        """Return the statistics of the inputs that were collected last, and drop their sums."""
        if self._sums:
            with self._clock.phase("estimate"):
                self._values = {name: sums.value(self._processes) for name, sums in self._sums.items()}
            self._sums = {}
        return self._values

    def block_values(self, layer: Layer) -> dict[str, Any]:
        """Return the statistics of a layer that the pass over the block collected; None where it did not reach."""
        return {name: values.get(layer.name) for name, values in self._of_block.items()}
