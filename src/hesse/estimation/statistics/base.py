"""Statistic: one thing that data tells about a layer, as an object that says how it is collected."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from hesse.networks.network import Block, Layer
from hesse.passes.stream import StreamBatch
from hesse.processes import Processes


class InputAccumulator(Protocol):
    """Sums over the inputs of one layer, batch by batch."""

    def add(self, rows: Tensor, batch: int) -> None:
        """Add the rows (..., in) of batch number `batch`."""

    def value(self, processes: Processes) -> Any:
        """Return the statistic over all batches of all `processes`; None where it is not known."""


class Statistic(ABC):
    """One thing that data tells about a layer."""

    name: ClassVar[str]


class InputStatistic(Statistic):
    """A statistic of a layer's inputs; layers with the same inputs share its value."""

    def prepare(self, batches: Sequence[StreamBatch], block: Block, index: int) -> Any:
        """Return what `accumulator` needs of a block before the batches go through it; None if nothing."""
        return None

    @abstractmethod
    def accumulator(self, layer: Layer, prepared: Any) -> InputAccumulator | None:
        """Return an empty accumulator for the inputs of `layer`; None if it cannot be collected there."""


class BlockStatistic(Statistic):
    """A statistic that a pass over a block gives before its layers are changed."""

    @abstractmethod
    def values(
        self, batches: Sequence[StreamBatch], block: Block, index: int, processes: Processes
    ) -> Mapping[str, Tensor]:
        """Return the statistic by the names of the layers where it is known."""
