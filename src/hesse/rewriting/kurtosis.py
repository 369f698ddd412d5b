"""KurTail: rotations learned so that inputs have the kurtosis of a uniform distribution, which rounds best."""

import torch
from torch import Tensor

UNIFORM = 1.8  # E[x⁴] / E[x²]² of what is uniform around 0
STEPS = 100
FIRST_STEP, SMALLEST_STEP = 1.0, 1e-6
ENOUGH = 0.25  # of the first-order decrease that a step has to reach


def kurtosis(inputs: Tensor) -> Tensor:
    """E[x⁴] / E[x²]² over the features of each token of `inputs` (tokens, n), around 0, where symmetric grids lie."""
    squares = inputs.square()
    return squares.square().mean(-1) / squares.mean(-1).square()


def learn_rotation(inputs: Tensor, start: Tensor, steps: int = STEPS) -> Tensor:
    """An orthogonal R (n, n) with less mean |kurtosis(R x) - 1.8| over tokens than `start`, or `start`.

    `inputs` are x (tokens, n); tokens of zeros say nothing. Gradient descent on the orthogonal group in float64: the
    gradient G gives the skew A = G Rᵀ - R Gᵀ, and the Cayley transform R ← (I + ½ τ A)⁻¹ (I - ½ τ A) R stays orthogonal
    at any τ, which is halved until the loss falls enough and doubled after each step that did. Nothing in it is random.
    Source: KurTail (Akhondzadeh et al., 2025), which takes Cayley Adam steps on batches.
    """
    tokens = inputs.double()
    tokens = tokens[tokens.square().sum(-1) > 0]
    rotation, step = start.double(), FIRST_STEP
    if not len(tokens):
        return rotation
    tokens = tokens / tokens.square().mean(-1, keepdim=True).sqrt()  # so that kurtosis is the mean fourth power
    identity = torch.eye(len(rotation), dtype=torch.float64, device=rotation.device)
    loss, gradient = _loss(tokens, rotation)
    for _ in range(steps):
        skew = gradient @ rotation.T - rotation @ gradient.T
        slope = float(skew.square().sum()) / 2
        while step >= SMALLEST_STEP:
            moved = torch.linalg.solve(identity + step / 2 * skew, (identity - step / 2 * skew) @ rotation)
            found, next_gradient = _loss(tokens, moved)
            if found <= loss - ENOUGH * step * slope:
                break
            step /= 2
        else:
            break
        rotation, loss, gradient, step = moved, found, next_gradient, 2 * step
    return rotation


def _loss(tokens: Tensor, rotation: Tensor) -> tuple[float, Tensor]:
    """Mean |kurtosis - 1.8|, and its gradient in R, for `tokens` of mean square 1."""
    turned = tokens @ rotation.T
    away = turned.square().square().mean(-1) - UNIFORM
    gradient = (away.sign()[:, None] * turned**3).T @ tokens * (4 / tokens.numel())
    return float(away.abs().mean()), gradient
