"""Random Hadamard rotations, which spread outliers evenly over all features."""

import torch
from torch import Tensor


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """Draw a random orthogonal matrix (size, size) in float64 with entries of about equal size.

    For a power of 2 it is H diag(±1) with random signs, where H is Sylvester's Hadamard matrix with entries ±size^-½.
    For other sizes H is replaced by H ⊗ Q, with Q a random orthogonal matrix of the odd factor. Source: QuaRot
    (Ashkboos et al., 2024), QuIP#.
    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    odd = size // power
    if odd > 1:
        matrix = torch.kron(matrix, torch.linalg.qr(torch.randn(odd, odd, generator=generator).double()).Q.contiguous())
    return matrix * (torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1)
