"""All that this benchmark uses of Hesse's estimation of Kronecker factors: the one place to adapt when that changes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from hesse import EigenKronecker, Objective
from hesse.estimation import eigen_kronecker, kronecker_factors


@dataclass(frozen=True)
class Fitted:
    """EK-FAC of some layers, and the seconds of its stages."""

    covariance: float
    eigendecomposition: float
    correction: float
    inputs: dict[str, Tensor]  # mean over positions of x xᵀ
    gradients: dict[str, Tensor]  # sum over positions of g gᵀ, times the objective's scale
    curvatures: dict[str, EigenKronecker]


def fit(objective: Objective, kind: str, per: str) -> Fitted:
    """Factors, their eigenvectors and the corrected eigenvalues.

    `eigen_kronecker` takes the eigenvectors itself: it is given layers that have them, to time the stages apart.
    """
    start = time.perf_counter()
    factors = kronecker_factors(objective, kind, per)
    covariance = time.perf_counter()
    vectors = {name: layer.kronecker.eigenvectors() for name, layer in factors.items()}
    eigendecomposition = time.perf_counter()
    known: Any = {
        name: SimpleNamespace(kronecker=SimpleNamespace(eigenvectors=lambda pair=pair: pair, per=per))
        for name, pair in vectors.items()
    }
    curvatures = eigen_kronecker(objective, known, kind)
    correction = time.perf_counter()
    return Fitted(
        covariance=covariance - start,
        eigendecomposition=eigendecomposition - covariance,
        correction=correction - eigendecomposition,
        inputs={name: layer.kronecker.input_factor for name, layer in factors.items()},
        gradients={name: layer.kronecker.output_factor for name, layer in factors.items()},
        curvatures=curvatures,
    )
