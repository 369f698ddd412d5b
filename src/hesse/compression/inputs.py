"""The Gram of each layer's inputs, as calibration samples stop there."""

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.estimation import GramAccumulator, seen_by
from hesse.models.network import Layer
from hesse.processes import ALONE, Processes
from hesse.progress import Clock


class InputGrams:
    """One Gram for all layers with the same input, summed on the way through a block and finished when asked for.

    Of all `processes`, which ask for the same ones.
    """

    def __init__(self, clock: Clock, processes: Processes = ALONE, with_peaks: bool = False) -> None:
        self._clock, self._processes = clock, processes
        self._peaks: Tensor | None = None  # Σ max|x|² over tokens, where that is asked for
        self._with_peaks = with_peaks
        self._accumulator: GramAccumulator | None = None
        self._gram: Gram | None = None  # None while inputs are collected

    def collect(self, layer: Layer, inputs: Tensor) -> None:
        """Add `inputs` of `layer`; the first after a Gram was asked for begin another."""
        with self._clock.phase("estimate"):
            rows = seen_by(layer.module, inputs)
            if self._accumulator is None or self._gram is not None:
                self._accumulator, self._gram = GramAccumulator(layer.name, rows.shape[-1], rows.device), None
                self._peaks = torch.zeros(1, dtype=torch.float64) if self._with_peaks else None
            self._accumulator.add(rows)
            if self._peaks is not None:
                self._peaks += rows.abs().amax(-1).double().square().sum().cpu()

    def gram(self) -> Gram:
        """The Gram of what was collected last: the same object until more is collected."""
        if self._gram is None:
            assert self._accumulator is not None
            with self._clock.phase("estimate"):
                self._processes.add(self._accumulator.total)
                self._accumulator.tokens = self._processes.total(self._accumulator.tokens)
                if self._peaks is not None:
                    self._processes.add(self._peaks)
                self._gram, self._accumulator = self._accumulator.gram(), None  # what it holds is not needed any more
        return self._gram

    def square_peak(self) -> float | None:
        """E[max|x|²] over the tokens of what was collected last; None where that was not asked for."""
        return None if self._peaks is None else float(self._peaks) / max(self.gram().tokens, 1)
