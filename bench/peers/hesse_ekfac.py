"""EK-FAC by Hesse, with the seconds of its stages."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hesse.curvature import EigenKronecker, Kronecker, Objective
from hesse.estimation import eigen_kronecker, estimate_curvatures


@dataclass(frozen=True)
class Fitted:
    """EK-FAC of some layers, and the seconds of its stages."""

    covariance: float
    eigendecomposition: float
    correction: float
    inputs: dict[str, Tensor]  # mean over positions of x xᵀ
    gradients: dict[str, Tensor]  # sum over positions of g gᵀ, times the objective's scale
    curvatures: dict[str, EigenKronecker]


def fit(objective: Objective, kind: Any, per: Any) -> Fitted:
    """Factors, their eigenvectors and the corrected eigenvalues of the objective's matrices."""
    spent, decompose = [], torch.linalg.eigh

    def timed(matrix: Tensor) -> Any:
        begun = time.perf_counter()
        found = decompose(matrix)
        spent.append(time.perf_counter() - begun)
        return found

    start = time.perf_counter()
    factors = estimate_curvatures(objective, ["kronecker"], kind, per).kronecker
    covariance = time.perf_counter()
    with patch.object(torch.linalg, "eigh", timed):
        curvatures = eigen_kronecker(objective, factors)
    correction = time.perf_counter()
    layers = {
        name.removesuffix(".weight"): factor
        for name, factor in factors.items()
        if name in curvatures and isinstance(factor, Kronecker)
    }
    return Fitted(
        covariance=covariance - start,
        eigendecomposition=sum(spent),
        correction=correction - covariance - sum(spent),
        inputs={name: factor.input_factor for name, factor in layers.items()},
        gradients={name: factor.output_factor for name, factor in layers.items()},
        curvatures={name.removesuffix(".weight"): curvature for name, curvature in curvatures.items()},
    )
