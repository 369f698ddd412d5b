"""GPTQ and the two-sided update as plain loops in the symbols of the papers: what the fast solvers must equal.

The tests compare `ErrorFeedback` and `TwoSidedFeedback` with these loops, which nothing else calls. They decide one
weight or column at a time in float64 and share no code with the solvers.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def gptq(
    W: Tensor,  # (out, in)
    H: Tensor,  # (in, in), E[xxᵀ] + λI; GPTQ's 2XXᵀ + λI is a multiple
    order: list[int],  # of the columns
    nearest: Callable[[Tensor, int], Tensor],  # (W as it stands, column) to the column's nearest allowed values (out,)
) -> Tensor:
    """Return Q (out, in): columns rounded one after another, each error fed back to the columns not yet rounded.

    Frantar et al., 2022 (arXiv:2210.17323), algorithm 1 with blocks of one column. With zeros for allowed values it is
    SparseGPT (Frantar and Alistarh, 2023), with `nearest` on an integer grid LDLQ (QuIP; Chee et al., 2023).
    """
    W, Q = W.double().clone(), torch.zeros_like(W, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H.double()[order][:, order]), upper=True)  # H⁻¹ = UᵀU
    for i, column in enumerate(order):
        Q[:, column] = nearest(W, column)
        E = (W[:, column] - Q[:, column]) / U[i, i]
        W[:, order[i:]] -= torch.outer(E, U[i, i:])
    return Q


def two_sided(
    W: Tensor,  # (out, in)
    G: Tensor,  # (out, out), E[ggᵀ] of the gradients at the outputs
    A: Tensor,  # (in, in), E[xxᵀ]
    rows: list[int],  # order of the rows
    columns: list[int],  # order of the columns
    nearest: Callable[[Tensor, int, int], Tensor],  # (weight, row, column) to the nearest allowed value
) -> Tensor:
    """Return Q (out, in): weights rounded one after another, each error fed back to all weights not yet rounded.

    The update of YAQA (Tseng et al., 2025, arXiv:2505.22988) for H = G ⊗ A: optimal brain surgery over the whole
    matrix, since the Cholesky factor of H⁻¹ is the Kronecker product of those of G⁻¹ and A⁻¹. The weights are taken
    column by column, and row by row within a column.
    """
    W, Q = W.double().clone(), torch.zeros_like(W, dtype=torch.float64)
    U_G = torch.linalg.cholesky(torch.linalg.inv(G.double()[rows][:, rows]), upper=True)  # G⁻¹ = U_Gᵀ U_G
    U_A = torch.linalg.cholesky(torch.linalg.inv(A.double()[columns][:, columns]), upper=True)
    for j, column in enumerate(columns):
        for i, row in enumerate(rows):
            Q[row, column] = nearest(W[row, column], row, column)
            e = (W[row, column] - Q[row, column]) / (U_G[i, i] * U_A[j, j])
            left = torch.tensor(rows[i:])[:, None], torch.tensor(columns[j:])
            W[left] -= e * torch.outer(U_G[i, i:], U_A[j, j:])
    return Q
