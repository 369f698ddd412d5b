"""The Gram of each layer's inputs, as calibration samples stop there."""

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.estimation import GramAccumulator
from hesse.networks.network import Layer
from hesse.passes.parts import seen_by
from hesse.processes import ALONE, Processes
from hesse.progress import Clock


class InputGrams:
    """One Gram for all layers with the same input, summed on the way through a block and finished when asked for.

    With `weights` r of the positions of each flow (samples, tokens), also the same of √r x: E[r xxᵀ].

    Of all `processes`, which ask for the same ones.
    """

    def __init__(
        self,
        clock: Clock,
        processes: Processes = ALONE,
        with_peaks: bool = False,
        weights: list[Tensor] | None = None,
    ) -> None:
        self._clock, self._processes, self._weights = clock, processes, weights
        self._peaks: Tensor | None = None  # Σ max|x|² over tokens, where that is asked for
        self._with_peaks = with_peaks
        self._flow = 0  # the one whose inputs come next
        self._weighted: GramAccumulator | None = None
        self.weighted: Gram | None = None  # of what was asked for last; None where the positions are not known
        self._accumulator: GramAccumulator | None = None
        self._gram: Gram | None = None  # None while inputs are collected

    def collect(self, layer: Layer, inputs: Tensor) -> None:
        """Add `inputs` of `layer`; the first after a Gram was asked for begin another."""
        with self._clock.phase("estimate"):
            rows = seen_by(layer.module, inputs)
            if self._accumulator is None or self._gram is not None:
                self._accumulator, self._gram = GramAccumulator(layer.name, rows.shape[-1], rows.device), None
                self._peaks = torch.zeros(1, dtype=torch.float64) if self._with_peaks else None
                self._flow, self._weighted = 0, None
                if self._weights is not None and ".experts." not in layer.name:  # which see some positions only
                    self._weighted = GramAccumulator(layer.name, rows.shape[-1], rows.device)
            self._accumulator.add(rows)
            if self._peaks is not None:
                self._peaks += rows.abs().amax(-1).double().square().sum().cpu()
            if self._weighted is not None and self._weights is not None:
                flat, weights = rows.reshape(-1, rows.shape[-1]), self._weights[self._flow].flatten()
                if len(flat) == len(weights):
                    self._weighted.add(flat.float() * weights.sqrt()[:, None])
                else:
                    self._weighted = None
            self._flow += 1

    def gram(self) -> Gram:
        """The Gram of what was collected last: the same object until more is collected."""
        if self._gram is None:
            assert self._accumulator is not None
            with self._clock.phase("estimate"):
                if self._peaks is not None:
                    self._processes.all_reduce(self._peaks)
                self._gram, self._accumulator = self._finished(self._accumulator), None  # what it held goes
                self.weighted = None if self._weighted is None else self._finished(self._weighted)
                self._weighted = None
        return self._gram

    def square_peak(self) -> float | None:
        """E[max|x|²] over the tokens of what was collected last; None where that was not asked for."""
        return None if self._peaks is None else float(self._peaks) / max(self.gram().tokens, 1)

    def _finished(self, accumulator: GramAccumulator) -> Gram:
        self._processes.all_reduce(accumulator.total)
        accumulator.tokens = self._processes.all_reduce_sum(accumulator.tokens)
        return accumulator.gram()
