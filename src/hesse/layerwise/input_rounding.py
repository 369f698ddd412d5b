"""What it costs that a loader rounds the inputs of a layer."""

import torch
from torch import Tensor


def rounding_cost(weight: Tensor, output_factor: Tensor, square_peak: float, bits: int) -> float:
    """½ tr(G W Cov(e) Wᵀ) in nats per token, of the rounding errors e of a layer's inputs.

    Each token has a step of its own, s = 2 max|x| / (2^bits - 1), and its errors are taken as uniform in ±s/2 and
    independent of one another: Cov(e) = E[s²]/12 · I, but for the largest, which lies half-way between two codes: 2/in
    more. Where a few inputs are large and the others far below a step, these have smaller errors than that. `weight` is
    (out, in), `output_factor` E[ggᵀ] (out, out) or its diagonal (out,), `square_peak` E[max|x|²] over
    tokens.
    """
    variance = 4 * square_peak / ((1 << bits) - 1) ** 2 / 12 * (1 + 2 / weight.shape[1])
    factor = output_factor.to(weight)
    weighed = factor @ weight if factor.ndim == 2 else factor[:, None] * weight
    weighted = float(torch.linalg.vecdot(weighed, weight).double().sum())
    return 0.5 * variance * weighted
