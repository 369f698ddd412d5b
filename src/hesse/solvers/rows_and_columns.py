"""CUR: a low rank built from rows and columns of the weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, LowRank, LowRankCode
from hesse.curvature import Curvature, Gram, Identity
from hesse.solvers.base import Solver, float32_bytes, require_constraint


@dataclass(frozen=True)
class RowsAndColumns(Solver):
    """Approximate W by C U R, with `rank` of its own columns C and rows R, and the best U under the curvature.

    Use it where the factors should stay readable as parts of W, or where only U is to be trained afterwards;
    WhitenedSVD is never worse.

    Equivalent to CURing (Park and Moon, 2025), whose U is C⁺ W R⁺; here U = C⁺ W A Rᵀ (R A Rᵀ)⁺ minimizes ‖(W - C U R)
    A^½‖. DEIM (Sorensen and Embree, 2016) picks rows and columns from the leading singular vectors of W A^½: at each
    step the largest entry of what interpolation at the indices picked so far leaves.

    The curvature must be an Identity or a Gram; the constraint a LowRank.
    """

    curvatures = (Identity, Gram)

    def compute(self, state: Curvature, weight: Tensor, constraint: Constraint) -> LowRankCode:
        constraint = require_constraint(self, constraint, LowRank)
        root = state.factor.to(weight.dtype) if isinstance(state, Gram) else None
        important = weight if root is None else weight @ root
        left, _, right = torch.linalg.svd(important, full_matrices=False)
        rows = interpolation_points(left[:, : constraint.rank])
        if root is not None:  # directions of the inputs, back from those of A^½
            right = torch.linalg.qr(root @ right[: constraint.rank].T).Q.T
        columns = interpolation_points(right[: constraint.rank].T)
        own_columns, own_rows = weight[:, columns], weight[rows]
        across = own_rows if root is None else own_rows @ root
        join = torch.linalg.pinv(own_columns) @ important @ torch.linalg.pinv(across)
        return constraint.encode_factors(own_columns @ join, own_rows)

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        if issubclass(curvature, Gram):
            return max(float32_bytes(shape, inputs=2.1), float32_bytes(shape, weights=5, inputs=1))
        return float32_bytes(shape, weights=4.2)


def interpolation_points(vectors: Tensor) -> Tensor:
    """Return the indices (k,) that DEIM picks for orthonormal `vectors` (n, k)."""
    places: list[int] = []
    for number in range(vectors.shape[1]):
        vector = vectors[:, number]
        if places:
            chosen = torch.tensor(places, device=vectors.device)
            weights = torch.linalg.lstsq(vectors[chosen, :number], vector[chosen, None]).solution
            vector = vector - vectors[:, :number] @ weights[:, 0]
        places.append(int(vector.abs().argmax()))
    return torch.tensor(places, device=vectors.device)
