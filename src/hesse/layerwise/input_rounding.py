"""Cost of rounding the inputs of a layer."""

import torch
from torch import Tensor


def rounding_cost(weight: Tensor, output_factor: Tensor, square_peak: float, bits: int) -> float:
    """Return ½ tr(G W Cov(e) Wᵀ) in nats per token, for the rounding errors e of a layer's inputs.

    Each token has its own step s = 2 max|x| / (2^bits - 1). Its errors are assumed uniform in ±s/2 and independent, so
    Cov(e) = E[s²]/12 · I, except for the largest input, which lies half-way between two codes and adds 2/in. If a few
    inputs are large and the others far below a step, the true errors are smaller. `weight` is (out, in),
    `output_factor` is E[ggᵀ] (out, out) or its diagonal (out,), `square_peak` is E[max|x|²] over tokens.
    """
    variance = 4 * square_peak / ((1 << bits) - 1) ** 2 / 12 * (1 + 2 / weight.shape[1])
    factor = output_factor.to(weight)
    weighed = factor @ weight if factor.ndim == 2 else factor[:, None] * weight
    weighted = float(torch.linalg.vecdot(weighed, weight).double().sum())
    return 0.5 * variance * weighted
