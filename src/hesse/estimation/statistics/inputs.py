"""The Gram of a layer's inputs, and the peaks of its inputs."""

from typing import Any

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.estimation.gram import GramAccumulator
from hesse.estimation.statistics.base import InputAccumulator, InputStatistic
from hesse.networks.network import Layer
from hesse.processes import Processes


class Inputs(InputStatistic):
    """E[xxᵀ] of a layer's inputs x over tokens, a Gram."""

    name = "inputs"

    def accumulator(self, layer: Layer, prepared: Any) -> InputAccumulator:
        """Return an empty Gram."""
        return _Inputs(input_gram(layer))


class InputPeaks(InputStatistic):
    """E[max|x|²] of a layer's inputs x over tokens, a float: the cost of rounding inputs follows from it."""

    name = "input peaks"

    def accumulator(self, layer: Layer, prepared: Any) -> InputAccumulator:
        """Return an empty sum."""
        return _Peaks()


def input_gram(layer: Layer) -> GramAccumulator:
    """Return an empty Gram of a layer's inputs."""
    return GramAccumulator(layer.name, layer.weight.shape[1], layer.weight.device)


def gram_of_all(accumulator: GramAccumulator, processes: Processes) -> Gram:
    """Return the Gram of what all processes have added."""
    processes.all_reduce(accumulator.total)
    accumulator.tokens = processes.all_reduce_sum(accumulator.tokens)
    return accumulator.gram()


class _Inputs:
    def __init__(self, gram: GramAccumulator) -> None:
        self._gram = gram

    def add(self, rows: Tensor, batch: int) -> None:
        self._gram.add(rows)

    def value(self, processes: Processes) -> Gram:
        return gram_of_all(self._gram, processes)


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
