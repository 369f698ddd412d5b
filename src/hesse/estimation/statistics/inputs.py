"""The Gram of a layer's inputs, and the peaks of its inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.estimation.statistics.base import STATISTICS, InputAccumulator, InputStatistic
from hesse.estimation.statistics_folder import Statistics
from hesse.estimation.sums import GramAccumulator
from hesse.networks.network import Layer
from hesse.processes import Processes


class Inputs(InputStatistic):
    """E[xxᵀ] of a layer's inputs x over tokens, a Gram."""

    name = "inputs"

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return 4 bytes for each pair of inputs."""
        return 4 * shape[1] ** 2

    def working_bytes(self, shape: Sequence[int], tokens: int, length: int) -> int:
        """Return those of a batch's inputs in float32."""
        return 4 * tokens * shape[1]

    def check_folder(self, folder: Statistics) -> None:
        """Refuse a folder without Grams."""
        folder.check_holds("gram")

    def load(self, folder: Statistics, layer: Layer, device: torch.device) -> Any:
        """Return the Gram; layers with the same inputs get one object."""
        return folder.gram(layer.name, device)

    def accumulator(self, layer: Layer, prepared: Any) -> InputAccumulator:
        """Return an empty Gram."""
        return _Inputs(input_gram(layer))


class InputPeaks(InputStatistic):
    """E[max|x|²] of a layer's inputs x over tokens, a float: the cost of rounding inputs follows from it."""

    name = "input peaks"

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return those of a number."""
        return 8

    def check_folder(self, folder: Statistics) -> None:
        """Do nothing: without it the prediction leaves out that inputs are rounded, and says so."""

    def accumulator(self, layer: Layer, prepared: Any) -> InputAccumulator:
        """Return an empty sum."""
        return _Peaks()


def input_gram(layer: Layer) -> GramAccumulator:
    """Return an empty Gram of a layer's inputs."""
    return GramAccumulator(layer.name, layer.weight.shape[1], layer.weight.device)


class _Inputs:
    def __init__(self, gram: GramAccumulator) -> None:
        self._gram = gram

    def add(self, rows: Tensor, batch: int) -> None:
        self._gram.add(rows)

    def value(self, processes: Processes) -> Gram:
        return self._gram.gram(processes)


class _Peaks:
    def __init__(self) -> None:
        self._total, self._tokens = torch.zeros(1, dtype=torch.float64), 0

    def add(self, rows: Tensor, batch: int) -> None:
        peaks = rows.abs().amax(-1)
        self._total += peaks.double().square().sum().cpu()
        self._tokens += peaks.numel()

    def value(self, processes: Processes) -> float:
        processes.all_reduce(self._total)
        return float(self._total) / max(processes.all_reduce_sum(self._tokens), 1)


STATISTICS.register(Inputs.name, Inputs())
STATISTICS.register(InputPeaks.name, InputPeaks())
