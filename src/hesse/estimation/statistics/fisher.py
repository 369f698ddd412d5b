"""The Fisher on a layer's weight in nats per token: its diagonal, blocks on its diagonal, or the gradients it is of."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hesse.estimation.statistics.base import STATISTICS, BackwardAccumulator, BackwardStatistic
from hesse.estimation.statistics.output_factor import FACTOR_TOKENS
from hesse.estimation.statistics_folder import Statistics
from hesse.estimation.sums import GradientBlocks, GradientSquares
from hesse.networks.network import Layer
from hesse.passes.backward import layer_part
from hesse.passes.parts import ParameterPart
from hesse.passes.recorded_batch import RecordedBatch
from hesse.passes.sample_gradients import sample_gradients
from hesse.processes import Processes

BLOCK_SIZE = 32  # weights of a row; the blocks take as many times the weights' own memory


class FisherStatistic(BackwardStatistic):
    """A part of the Fisher on a layer's weight (out, in), however its module keeps it."""

    missing = "the tokens that probed the loss did not reach it; its weights were taken as equals"
    of_weights = True

    def probe_tokens(self, rows: int, calibration_tokens: int) -> int:
        """Return the same for all layers."""
        return FACTOR_TOKENS


class FisherDiagonal(FisherStatistic):
    """E[(g xᵀ)²] (out, in) per position: each position's gradient is squared by itself."""

    name: ClassVar[str] = "fisher diagonal"

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return 4 bytes for each weight."""
        return 4 * shape[0] * shape[1]

    def accumulator(self, layers: Sequence[Layer]) -> BackwardAccumulator:
        """Return empty sums."""
        weights = _weights(layers)
        squares = GradientSquares(_parts(layers), weights, "position")
        # All of them from the start, so that several processes add up the same.
        squares.sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        return _Totals(squares, lambda: squares.sums)

    def check_folder(self, folder: Statistics) -> None:
        """Refuse a folder without the Fisher."""
        folder.check_holds("fisher")

    def load(self, folder: Statistics, layer: Layer, device: torch.device) -> Any:
        """Return the Fisher's diagonal, which is per sample there."""
        fisher = folder.fisher(layer.name, device)
        if fisher is None:
            return None
        return fisher.values.T if layer.transposed else fisher.values


class FisherBlocks(FisherStatistic):
    """Blocks (blocks, size, size) of the Fisher on neighbors in row-major order, of gradients of whole samples."""

    name: ClassVar[str] = "fisher blocks"
    of_samples = True

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return 4 bytes for each entry of the blocks."""
        return 4 * shape[0] * shape[1] * BLOCK_SIZE

    def accumulator(self, layers: Sequence[Layer]) -> BackwardAccumulator:
        """Return empty sums."""
        blocks = GradientBlocks(_parts(layers), _weights(layers), BLOCK_SIZE)
        return _Totals(blocks, lambda: {name: block.total for name, block in blocks.sums.items()})


class FisherGradients(FisherStatistic):
    """Gradients g (samples, out, in) of whole samples, all kept, whose mean g gᵀ is the Fisher."""

    name: ClassVar[str] = "fisher gradients"
    of_samples = True

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return 4 bytes for each weight and sample."""
        return 4 * shape[0] * shape[1] * samples

    def probe_tokens(self, rows: int, calibration_tokens: int) -> int:
        """Return all tokens of the calibration."""
        return max(FACTOR_TOKENS, calibration_tokens)

    def accumulator(self, layers: Sequence[Layer]) -> BackwardAccumulator:
        """Return an empty list of gradients."""
        return _Gradients(layers)


def _parts(layers: Sequence[Layer]) -> dict[str, list[ParameterPart]]:
    """Return the weights of layers as (out, in) parts, by the layers' names."""
    return {layer.name: [replace(layer_part(layer), transposed=False)] for layer in layers}


def _weights(layers: Sequence[Layer]) -> dict[str, Tensor]:
    return {layer.name: layer.weight for layer in layers}


def _reached(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if bool(value.any())}


class _Totals:
    """Sums of some layers, whose `totals` the processes add up."""

    def __init__(self, sums: GradientSquares | GradientBlocks, totals: Callable[[], dict[str, Tensor]]) -> None:
        self.add, self._totals = sums.add, totals

    def values(self, scale: float, processes: Processes) -> dict[str, Tensor]:
        totals = self._totals()
        for total in totals.values():
            processes.all_reduce(total)
        return _reached({name: scale * total for name, total in totals.items()})


class _Gradients:
    def __init__(self, layers: Sequence[Layer]) -> None:
        self._parts, self._weights = _parts(layers), _weights(layers)
        self._gradients = {name: [weight.new_empty(0, *weight.shape)] for name, weight in self._weights.items()}

    def add(self, recorded: RecordedBatch) -> None:
        for name, weight in self._weights.items():
            self._gradients[name] += sample_gradients(recorded, name, self._parts[name], weight)

    def values(self, scale: float, processes: Processes) -> dict[str, Tensor]:
        values = {}
        for name in self._weights:
            gradients = processes.all_gather(torch.cat(self._gradients.pop(name)))
            values[name] = gradients.mul_((scale * len(gradients)) ** 0.5)  # so that their mean g gᵀ is per token
        return _reached(values)


STATISTICS.register(FisherDiagonal.name, FisherDiagonal())
STATISTICS.register(FisherBlocks.name, FisherBlocks())
STATISTICS.register(FisherGradients.name, FisherGradients())
