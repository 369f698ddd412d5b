"""Statistic: one thing that data tells about a layer, as an object that says how it is collected, kept and read."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hesse.errors import OptionError
from hesse.estimation.statistics_folder import Statistics
from hesse.networks.network import Block, Layer, Network
from hesse.passes.recorded_batch import RecordedBatch
from hesse.processes import ALONE, Processes
from hesse.registry import Registry

# The statistics that curvatures and predictions are made of, by name; a new one is a file and its line here.
STATISTICS: "Registry[Statistic]" = Registry(
    "statistic",
    (
        "hesse.estimation.statistics.inputs",
        "hesse.estimation.statistics.weighted_inputs",
        "hesse.estimation.statistics.output_factor",
        "hesse.estimation.statistics.attention_factor",
        "hesse.estimation.statistics.fisher",
    ),
)
Needs = Mapping[str, Collection[str]]  # the names of the statistics that each layer needs, by the layer's name


class Statistic(ABC):
    """A statistic of a layer that is collected from data.

    Its value is any object, or None if it is unknown. The three subclasses below define how it is collected: at the
    layers' inputs, in a pass over a block before its layers are changed, or in the backward pass.
    """

    name: ClassVar[str]
    # The note on a layer whose curvature needs the statistic and does not have it; None where that is no surprise.
    missing: ClassVar[str | None] = None
    # True if the value has entries for single weights, so that rows of a layer cannot be solved apart.
    of_weights: ClassVar[bool] = False

    @abstractmethod
    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return the bytes of the value for a layer of `shape` (out, in), from `samples` samples."""

    def working_bytes(self, shape: Sequence[int], tokens: int, length: int) -> int:
        """Return the bytes of workspace for collecting at a layer, for batches of `tokens` tokens."""
        return 0

    def is_known(self, value: Any) -> bool:
        """Return False if the value has no information about the layer."""
        return value is not None

    def check_network(self, network: Network, layers: Collection[str]) -> None:
        """Refuse a network on whose `layers` the statistic cannot be collected.

        Raises:
            UnsupportedModelError: it cannot.
        """
        return

    def check_folder(self, folder: Statistics) -> None:
        """Refuse a folder of `hesse estimate` that lacks the statistic.

        Raises:
            OptionError: no such folder has it.
            CheckpointError: this one has not.
        """
        raise OptionError(f"--statistics holds no {self.name}, which this method needs: leave it out")

    def load(self, folder: Statistics, layer: Layer, device: torch.device) -> Any:
        """Return the value for a layer from a folder of `hesse estimate`; None where the folder does not have it."""
        return None


class InputAccumulator(Protocol):
    """Sums over the inputs of one layer, batch by batch."""

    def add(self, rows: Tensor, batch: int) -> None:
        """Add the rows (..., in) of batch number `batch`."""

    def value(self, processes: Processes) -> Any:
        """Return the statistic over all batches of all `processes`; None where it is not known."""


class InputStatistic(Statistic):
    """A statistic of a layer's inputs; layers with the same inputs share its value."""

    def prepare(self, batches: Sequence[Any], block: Block, index: int) -> Any:
        """Return what `accumulator` needs of a block before the batches go through it; None if nothing."""
        return None

    @abstractmethod
    def accumulator(self, layer: Layer, prepared: Any) -> InputAccumulator | None:
        """Return an empty accumulator for the inputs of `layer`; None if it cannot be collected there."""


class BlockStatistic(Statistic):
    """A statistic that a pass over a block collects before its layers are changed."""

    @abstractmethod
    def values(self, batches: Sequence[Any], block: Block, index: int, processes: Processes) -> Mapping[str, Tensor]:
        """Return the statistic by the names of the layers where it is known."""


class BackwardAccumulator(Protocol):
    """Sums over the gradients of some layers, batch by batch."""

    def add(self, recorded: RecordedBatch) -> None:
        """Add a recorded batch."""

    def values(self, scale: float, processes: Processes) -> dict[str, Tensor]:
        """Return the sums of all `processes` times `scale`, by layer; without layers that no gradient reached."""


class BackwardStatistic(Statistic):
    """A statistic of the gradients of the loss, from the pass back through the unchanged model."""

    of_samples: ClassVar[bool] = False  # True if it needs gradients of single samples, not of positions

    @abstractmethod
    def probe_tokens(self, rows: int, calibration_tokens: int) -> int:
        """Return the tokens to pass back for a layer of `rows` outputs; the calibration has `calibration_tokens`."""

    @abstractmethod
    def accumulator(self, layers: Sequence[Layer]) -> BackwardAccumulator:
        """Return empty sums for some layers."""

    def is_known(self, value: Any) -> bool:
        """Return False if no gradient reached the layer."""
        return value is not None and bool(value.any())


class BackwardCollection:
    """The backward statistics that some layers need, summed batch by batch."""

    def __init__(self, layers: Sequence[Layer], needs: Needs) -> None:
        names = sorted({name for layer in layers for name in needs.get(layer.name, ())})
        self._sums = {
            name: statistic.accumulator([layer for layer in layers if name in needs.get(layer.name, ())])
            for name in names
            if isinstance(statistic := STATISTICS[name], BackwardStatistic)
        }

    def add(self, recorded: RecordedBatch) -> None:
        """Add a recorded batch."""
        for sums in self._sums.values():
            sums.add(recorded)

    def values(self, scale: float, processes: Processes = ALONE) -> dict[str, dict[str, Tensor]]:
        """Return by layer and statistic the sums times `scale`, which makes them means over terms of the loss."""
        values: dict[str, dict[str, Tensor]] = {}
        for name, sums in self._sums.items():
            for layer, value in sums.values(scale, processes).items():
                values.setdefault(layer, {})[name] = value
        return values


def needs_samples(needs: Needs) -> bool:
    """Return True if a backward statistic in `needs` is of the gradients of single samples."""
    return any(statistic.of_samples for statistic, _ in _backward(needs))


def probe_tokens(needs: Needs, layers: Sequence[Layer], calibration_tokens: int) -> int:
    """Return the number of tokens of the backward pass for all that `layers` need, at least those of a prediction."""
    rows = {layer.name: layer.weight.shape[0] for layer in layers}
    wanted = (statistic.probe_tokens(rows[layer], calibration_tokens) for statistic, layer in _backward(needs))
    return max(wanted, default=0)


def by_statistic(needs: Needs) -> dict[str, list[str]]:
    """Return the layers that need each statistic, by its name."""
    return {
        name: [layer for layer, names in needs.items() if name in names]
        for name in STATISTICS
        if any(name in names for names in needs.values())
    }


def _backward(needs: Needs) -> list[tuple[BackwardStatistic, str]]:
    return [
        (statistic, layer)
        for layer, names in needs.items()
        for name in names
        if isinstance(statistic := STATISTICS[name], BackwardStatistic)
    ]
