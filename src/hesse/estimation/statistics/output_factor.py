"""Output factor E[ggᵀ] of a layer: the curvature of the loss in the layer's outputs, whole or its diagonal."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hesse.data.selection import PROBE_TOKENS
from hesse.estimation.statistics.base import STATISTICS, BackwardAccumulator, BackwardStatistic
from hesse.estimation.statistics_folder import Statistics
from hesse.estimation.sums import OutputMoments
from hesse.networks.network import Layer
from hesse.passes.backward import layer_part
from hesse.passes.recorded_batch import RecordedBatch
from hesse.processes import Processes

FACTOR_TOKENS = 8192  # to estimate a whole factor (out, out) from, at least
FACTOR_TOKENS_PER_OUTPUT = 8


class OutputDiagonal(BackwardStatistic):
    """E[g²] (out,) of the loss's gradients g at a layer's outputs, per position, in nats per token.

    With the Gram of the inputs it predicts the loss increase of a change. A folder of `hesse estimate` may give all of
    the output factor in its place.
    """

    name: ClassVar[str] = "output diagonal"
    diagonal: ClassVar[bool] = True

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return 4 bytes for each output."""
        return 4 * shape[0]

    def probe_tokens(self, rows: int, calibration_tokens: int) -> int:
        """Return the same for all layers."""
        return PROBE_TOKENS

    def accumulator(self, layers: Sequence[Layer]) -> BackwardAccumulator:
        """Return empty sums."""
        return _Moments(layers, self.diagonal)

    def check_folder(self, folder: Statistics) -> None:
        """Do nothing: every folder has it."""

    def load(self, folder: Statistics, layer: Layer, device: torch.device) -> Any:
        """Return the output factor of the layer's Kronecker factors, or else what the folder has of it."""
        kronecker = folder.kronecker(layer.name, device)
        return folder.output_factors.get(layer.name) if kronecker is None else kronecker.output_factor


class OutputFactor(OutputDiagonal):
    """E[ggᵀ] (out, out) of the loss's gradients g at a layer's outputs, per position, in nats per token.

    With the Gram E[xxᵀ] of the inputs it gives the loss increase of a change d as ½ tr(E[ggᵀ] d E[xxᵀ] dᵀ): the other
    factor of a Kronecker curvature (K-FAC).
    """

    name = "output factor"
    missing = "the tokens that probed the loss did not reach it; its outputs were taken as equals"
    diagonal = False

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return 4 bytes for each pair of outputs."""
        return 4 * shape[0] ** 2

    def probe_tokens(self, rows: int, calibration_tokens: int) -> int:
        """Return more tokens than the factor has rows."""
        return max(FACTOR_TOKENS, FACTOR_TOKENS_PER_OUTPUT * rows)


class _Moments:
    """Σ g gᵀ or Σ g² of some layers."""

    def __init__(self, layers: Sequence[Layer], diagonal: bool) -> None:
        self._moments = OutputMoments([layer_part(layer) for layer in layers], "position", diagonal)

    def add(self, recorded: RecordedBatch) -> None:
        self._moments.add(recorded)

    def values(self, scale: float, processes: Processes) -> dict[str, Tensor]:
        for moment in self._moments.sums.values():
            moment.all_reduce(processes)
        return {
            modules[0]: moment.times(scale, f"gradients at the outputs of {modules[0]}")
            for modules, moment in self._moments.sums.items()
            if moment.count
        }


def output_factor(statistics: Mapping[str, Any]) -> Tensor | None:
    """Return the most that is known of a layer's output factor: (out, out), its diagonal (out,), or None."""
    factor: Tensor | None = statistics.get("output factor")
    return statistics.get("output diagonal") if factor is None else factor


STATISTICS.register(OutputDiagonal.name, OutputDiagonal())
STATISTICS.register(OutputFactor.name, OutputFactor())
