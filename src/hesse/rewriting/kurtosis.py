"""KurTail: learn rotations that give inputs the kurtosis of a uniform distribution, which rounds best."""

import torch
from torch import Tensor

UNIFORM = 1.8  # E[x⁴] / E[x²]² of a uniform distribution around 0
STEPS = 100
FIRST_STEP, SMALLEST_STEP = 1.0, 1e-6
ENOUGH = 0.25  # the share of the first-order decrease that a step must reach


def kurtosis(inputs: Tensor) -> Tensor:
    """Return E[x⁴] / E[x²]² over each token's features, for `inputs` (tokens, n), around 0 as in symmetric grids."""
    squares = inputs.square()
    return squares.square().mean(-1) / squares.mean(-1).square()


def learn_rotation(inputs: Tensor, start: Tensor, steps: int = STEPS) -> Tensor:
    """Learn an orthogonal R (n, n) with a smaller mean |kurtosis(R x) - 1.8| over tokens than `start` has.

    `inputs` are x (tokens, n); tokens of zeros are ignored. The method is gradient descent on the orthogonal group in
    float64: the gradient G gives the skew A = G Rᵀ - R Gᵀ, and the Cayley transform R ← (I + ½ τ A)⁻¹ (I - ½ τ A) R
    stays orthogonal for any step τ. τ is halved until the loss decreases enough, and then doubled. If the
    first step fails, `start` is returned. The result is deterministic. Source: KurTail (Akhondzadeh et al., 2025),
    which uses Cayley Adam steps on batches.
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
            next_loss, next_gradient = _loss(tokens, moved)
            if next_loss <= loss - ENOUGH * step * slope:
                break
            step /= 2
        else:
            break
        rotation, loss, gradient, step = moved, next_loss, next_gradient, 2 * step
    return rotation


def _loss(tokens: Tensor, rotation: Tensor) -> tuple[float, Tensor]:
    """Return the mean |kurtosis - 1.8| and its gradient in R, for `tokens` of mean square 1."""
    rotated = tokens @ rotation.T
    excess = rotated.square().square().mean(-1) - UNIFORM
    gradient = (excess.sign()[:, None] * rotated**3).T @ tokens * (4 / tokens.numel())
    return float(excess.abs().mean()), gradient
