"""Rotations that spread whatever stands out over all features alike."""

import torch
from torch import Tensor


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (size, size) in float64 with entries about as large as one another.

    H diag(±1) with random signs and H the Hadamard matrix of Sylvester, of entries ±size^-½, for a power of 2. For
    other sizes H ⊗ Q, Q a random orthogonal matrix of the odd factor. Source: QuaRot (Ashkboos et al., 2024), QuIP#.
    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    odd = size // power
    if odd > 1:
        matrix = torch.kron(matrix, torch.linalg.qr(torch.randn(odd, odd, generator=generator).double()).Q.contiguous())
    return matrix * (torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1)
