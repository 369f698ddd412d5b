"""A number that was estimated by sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over random probes: always read with its standard error."""

    value: Tensor  # a scalar, or one value an entry
    standard_error: Tensor  # of the same shape; infinite for one probe
    samples: int

    def __str__(self) -> str:
        if self.value.ndim:
            return f"{tuple(self.value.shape)} values from {self.samples} probes"
        return f"{float(self.value):.4g} ± {float(self.standard_error):.2g} ({self.samples} probes)"


def mean_of(samples: Tensor, offset: float = 0.0) -> Estimate:
    """Return the estimate from `samples` (probes, ...), shifted by a part that is known exactly."""
    count = len(samples)
    error = samples.std(0) / count**0.5 if count > 1 else torch.full_like(samples[0], float("inf"))
    return Estimate(samples.mean(0) + offset, error, count)
