"""CUR: a low rank made of the weight's own rows and columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, LowRank, LowRankCode
from hesse.curvature import Curvature, Gram, Identity
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver, float32_bytes, require_constraint


@dataclass(frozen=True)
class RowsAndColumns(Solver):
    """W ≈ C U R of `rank` columns C and rows R of W, U the best join of the two under the curvature.

    Rows and columns are those that DEIM picks from the leading singular vectors of W A^½: at each step the largest
    entry of what interpolation at the places picked so far leaves. U = C⁺ W A Rᵀ (R A Rᵀ)⁺ minimises
    ‖(W - C U R) A^½‖. Choose it where the factors should stay readable as parts of W, or only U is to be trained
    afterwards; WhitenedSVD is never worse. Source: CURing (Park and Moon, 2025), whose U is C⁺ W R⁺; DEIM for CUR
    (Sorensen and Embree, 2016).
    """

    def init(self, curvature: Curvature) -> Curvature:
        if not isinstance(curvature, Identity | Gram):
            raise UnsupportedProduct(f"RowsAndColumns needs an Identity or a Gram, not a {type(curvature).__name__}")
        return curvature

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
    """The places (k,) that DEIM picks for orthonormal `vectors` (n, k)."""
    places: list[int] = []
    for number in range(vectors.shape[1]):
        vector = vectors[:, number]
        if places:
            chosen = torch.tensor(places, device=vectors.device)
            weights = torch.linalg.lstsq(vectors[chosen, :number], vector[chosen, None]).solution
            vector = vector - vectors[:, :number] @ weights[:, 0]
        places.append(int(vector.abs().argmax()))
    return torch.tensor(places, device=vectors.device)
