"""Hesse's part of the curvature benchmark."""

from __future__ import annotations

from functools import partial

import hesse_ekfac
import torch
from curvature_common import Meter, run
from curvature_models import Problem, block_layers
from torch import Tensor, nn

import hesse
from hesse.curvature import GaussNewton, Hessian, Objective
from hesse.estimation import estimate_curvatures
from hesse.solvers import hutchinson_trace

KEPT = "keep_graph"


def objective_of(problem: Problem, names: list[str] | None = None) -> Objective:
    """The mean loss over all data."""
    return Objective.of(problem.model, nn.CrossEntropyLoss(), problem.batches, names)


def hessian(problem: Problem, meter: Meter, variant: str) -> dict[str, Tensor]:
    """Products with one vector."""
    curvature = Hessian(objective=objective_of(problem), keep_graph=variant == KEPT)
    (vector,) = problem.vectors(1)
    meter.begin()
    meter.products("product", lambda: curvature.matvec(vector))
    return {"product": curvature.matvec(vector)}


def trace(problem: Problem, meter: Meter, variant: str) -> dict[str, Tensor]:
    """Hutchinson's estimate from the Hessian."""
    objective = objective_of(problem)
    meter.begin()
    made = partial(Hessian, objective=objective, keep_graph=variant == KEPT)
    meter.estimate("trace", lambda probes: hutchinson_trace(made(), probes))
    return {}


def gauss_newton(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Products with one vector and with eight."""
    curvature = GaussNewton(objective=objective_of(problem))
    vectors = problem.vectors(8)
    meter.begin()
    meter.products("1 column", lambda: curvature.matvec(vectors[0]))
    meter.products("8 columns", lambda: curvature.matvec(vectors))
    return {"product": curvature.matvec(vectors[0])}


def diagonal(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """Mean square of samples' gradients, with the labels of the data."""
    objective = objective_of(problem)
    meter.begin()
    meter.time("diagonal", lambda: fisher_diagonal(objective))
    return {"product": fisher_diagonal(objective)}


def fisher_diagonal(objective: Objective) -> Tensor:
    """The diagonal of the empirical Fisher over all parameters, of whole samples."""
    found = estimate_curvatures(objective, ["fisher"], "empirical").fisher
    return torch.cat([diagonal.values.flatten() for diagonal in found.values()])


def ekfac(problem: Problem, meter: Meter, variant: str) -> dict[str, Tensor]:
    """Each stage of EK-FAC of the blocks' linear layers, and one inverse product with all of them."""
    names = [f"{name}.weight" for name in block_layers(problem.model)]
    objective = objective_of(problem, names)
    gradients = {name: problem.gradient(f"{name}.weight") for name in block_layers(problem.model)}
    meter.begin()
    meter.time("plain gradient", problem.forward_backward)
    fitted = hesse_ekfac.fit(objective, "sampled", variant.removeprefix("per "))
    meter.seconds |= {"covariance": fitted.covariance, "eigendecomposition": fitted.eigendecomposition}
    meter.seconds |= {"correction": fitted.correction}
    damped = {name: curvature.damped(0.1) for name, curvature in fitted.curvatures.items()}
    meter.products("inverse product", lambda: [damped[name].solve(g) for name, g in gradients.items()])
    return {}


def agreement(problem: Problem, meter: Meter, _: str) -> dict[str, Tensor]:
    """What every peer computes a part of."""
    objective, (vector,) = objective_of(problem), problem.vectors(1)
    meter.begin()
    gauss_newton = GaussNewton(objective=objective)
    found = {
        "Hessian product": Hessian(objective=objective).matvec(vector),
        "Gauss-Newton product": gauss_newton.matvec(vector),
        "Gauss-Newton diagonal": gauss_newton.matrix().diagonal(),
        "empirical Fisher diagonal": fisher_diagonal(objective),
    }
    directions = dict(zip(objective.names, objective.split(vector), strict=True))
    for per, words in (("position", "expand"), ("sample", "reduce")):
        fitted = hesse_ekfac.fit(objective, "empirical", per)
        for name, curvature in fitted.curvatures.items():
            direction = directions[f"{name}.weight"].flatten(1)
            found[f"K-FAC {words}, input factor/{name}"] = fitted.inputs[name]
            found[f"K-FAC {words}, gradient factor/{name}"] = fitted.gradients[name]
            found[f"K-FAC {words}, product/{name}"] = fitted.gradients[name] @ direction @ fitted.inputs[name]
            found[f"EK-FAC {words}, product/{name}"] = curvature.matvec(direction)
    return found


if __name__ == "__main__":
    steps = {"hessian": hessian, "trace": trace, "gauss_newton": gauss_newton, "diagonal": diagonal}
    run(hesse.__version__, {**steps, "ekfac": ekfac, "agreement": agreement})
