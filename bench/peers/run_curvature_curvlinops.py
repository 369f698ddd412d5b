"""curvlinops' part of the curvature benchmark."""

from __future__ import annotations

from importlib.metadata import version

from curvature_common import Meter, run
from curvature_models import Problem
from curvlinops import (
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    hutchinson_trace,
)
from torch import Tensor, nn


def operator(kind: type, problem: Problem) -> HessianLinearOperator | GGNLinearOperator:
    """An operator of the mean loss; its checks of the data, products of their own, are off."""
    flat = problem.flat() if problem.batches[0][1].ndim > 1 else problem
    samples = sum(len(inputs) for inputs, _ in flat.batches)
    loss = nn.CrossEntropyLoss()
    return kind(flat.model, loss, flat.parameters, flat.batches, check_deterministic=False, num_data=samples)


def hessian(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Products with one vector."""
    curvature, (vector,) = operator(HessianLinearOperator, problem), problem.vectors(1)
    meter.begin()
    meter.products("product", lambda: curvature @ vector)
    return {"product": curvature @ vector}


def trace(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Hutchinson's estimate from the Hessian."""
    curvature = operator(HessianLinearOperator, problem)
    meter.begin()
    meter.estimate("trace", lambda probes: hutchinson_trace(curvature, probes))
    return {}


def gauss_newton(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Products with one vector and with eight."""
    curvature, columns = operator(GGNLinearOperator, problem), problem.vectors(8).T.contiguous()
    first = columns[:, 0].contiguous()
    meter.begin()
    meter.products("1 column", lambda: curvature @ first)
    meter.products("8 columns", lambda: curvature @ columns)
    return {"product": curvature @ first}


def agreement(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Products, and K-FAC with the labels of the data. Its scales are Hesse's: G a sum over places, A a mean.

    Expanded, its EK-FAC takes whole samples' eigenvalues of a convolution, which Hesse refuses: it is left out.
    """
    (vector,) = problem.vectors(1)
    meter.begin()
    found = {
        "Hessian product": operator(HessianLinearOperator, problem) @ vector,
        "Gauss-Newton product": operator(GGNLinearOperator, problem) @ vector,
    }
    if problem.batches[0][1].ndim > 1:  # its K-FAC wants the classes second; outputs flattened would lose the sharing
        return found
    directions = dict(zip((n for n, _ in problem.model.named_parameters()), problem.split(vector), strict=True))
    for approximation in ("expand", "reduce"):
        settings = {"fisher_type": "empirical", "kfac_approx": approximation, "check_deterministic": False}
        arguments = (problem.model, nn.CrossEntropyLoss(), problem.parameters, problem.batches)
        kfac = KFACLinearOperator(*arguments, **settings)
        kfac.compute_kronecker_factors()
        products = dict(zip(directions, kfac @ list(directions.values()), strict=True))
        corrected = EKFACLinearOperator(*arguments, **settings) @ list(directions.values())
        for (parameter, product), other in zip(products.items(), corrected, strict=True):
            name = parameter.removesuffix(".weight")
            found[f"K-FAC {approximation}, input factor/{name}"] = kfac._input_covariances[name]
            found[f"K-FAC {approximation}, gradient factor/{name}"] = kfac._gradient_covariances[name]
            found[f"K-FAC {approximation}, product/{name}"] = product.flatten(1)
            if approximation == "reduce" or directions[parameter].ndim == 2:
                found[f"EK-FAC {approximation}, product/{name}"] = other.flatten(1)
    return found


if __name__ == "__main__":
    steps = {"hessian": hessian, "trace": trace, "gauss_newton": gauss_newton, "agreement": agreement}
    run(version("curvlinops-for-pytorch"), steps)
