"""Trace and diagonal of a curvature from its products with random vectors, and the estimates that these give."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.curvature import Curvature
from hesse.errors import OptionError


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


TOGETHER = 8  # probes in one product


def hutchinson_trace(curvature: Curvature, probes: int = 32, seed: int = 0) -> Estimate:
    """Tr H as the mean of zᵀHz over random signs z; without damping. Source: Hutchinson, 1989."""
    samples = [
        (signs * curvature.matvec(signs)).double().flatten(1).sum(1) for signs in _some_signs(curvature, probes, seed)
    ]
    return mean_of(torch.cat(samples))


def hutch_plus_plus(curvature: Curvature, products: int = 33, seed: int = 0) -> Estimate:
    """Tr H from `products` products: exactly on a subspace of a third of them, by Hutchinson on the rest.

    The error falls as 1 / products instead of 1 / √products where few eigenvalues hold the trace. The standard error is
    that of the sampled part. Source: Hutch++ (Meyer, Musco, Musco and Woodruff, 2021).

    Raises:
        OptionError: fewer than 3 products.
    """
    if products < 3:
        raise OptionError(f"Hutch++ was given {products} products: it needs 3 or more")
    third, size = products // 3, curvature.shape.numel()
    sketch = curvature.matvec(random_signs(curvature, third, seed)).double().reshape(third, size)
    basis = torch.linalg.qr(sketch.T).Q  # (size, third)
    within = (basis.T.reshape(-1, *curvature.shape)).to(curvature.dtype)
    exact = float((within * curvature.matvec(within)).double().sum())
    signs = random_signs(curvature, products - 2 * third, seed + 1).double().reshape(-1, size)
    vectors = (signs - signs @ basis @ basis.T).reshape(-1, *curvature.shape).to(curvature.dtype)
    return mean_of((vectors * curvature.matvec(vectors)).double().flatten(1).sum(1), exact)


def hutchinson_diagonal(curvature: Curvature, probes: int = 32, seed: int = 0) -> Estimate:
    """diag(H) as the mean of z ⊙ Hz over random signs z; without damping. Source: Bekas, Kokiopoulou and Saad, 2007."""
    samples = [(signs * curvature.matvec(signs)).double() for signs in _some_signs(curvature, probes, seed)]
    return mean_of(torch.cat(samples))


def _some_signs(curvature: Curvature, number: int, seed: int) -> Iterator[Tensor]:
    """Yield `number` random signs, a few at a time."""
    for start in range(0, max(number, 1), TOGETHER):
        yield random_signs(curvature, min(TOGETHER, number - start), seed + start)


def random_signs(curvature: Curvature, number: int, seed: int) -> Tensor:
    """Return `number` tensors (number, *shape) of ±1, in the curvature's precision."""
    if number < 1:
        raise OptionError(f"{number} random vectors were asked: use 1 or more")
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (number, *curvature.shape), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(curvature.device, curvature.dtype)
