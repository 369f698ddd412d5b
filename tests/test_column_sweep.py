"""The compiled sweep over columns beside the plain one."""

import pytest
import torch
from torch import Tensor

from hesse.constraints import Constraint, GridCode
from hesse.curvature import Gram
from hesse.solvers import ErrorFeedback, Solution, error_feedback, solve
from sweep_cases import CONSTRAINTS, WEIGHTS, normal


def gram(seed: int, width: int) -> Gram:
    inputs = normal(seed, 4 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 4 * width, 1)
    return Gram.from_inputs(inputs).damped(0.01)


def both(
    weight: Tensor, constraint: Constraint, solver: ErrorFeedback, monkeypatch: pytest.MonkeyPatch
) -> tuple[Solution, Solution]:
    """By the compiled loop, and by single operations that round a product before they add it, as the loop does."""
    curvature = gram(0, weight.shape[1])
    found = solve(weight, curvature, constraint, solver)
    monkeypatch.setattr(error_feedback, "_compiled_walk", lambda _: None)
    monkeypatch.setattr(Tensor, "addr_", lambda self, a, b, alpha: self.add_(torch.outer(a, b), alpha=alpha))
    return found, solve(weight, curvature, constraint, solver)


def check(found: Solution, plain: Solution) -> None:
    if isinstance(plain.encoded, GridCode):
        assert torch.equal(found.encoded.codes, plain.encoded.codes)
        assert torch.equal(found.encoded.scales.scale, plain.encoded.scales.scale)
    assert torch.equal(found.weight, plain.weight)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("constraint", [CONSTRAINTS["groups"], CONSTRAINTS["asymmetric"]], ids=str)
def test_any_weight(name: str, constraint: Constraint, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*both(WEIGHTS[name], constraint, ErrorFeedback("descending", 32), monkeypatch))


@pytest.mark.parametrize("order", ["given", "descending"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_any_constraint(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    descending = order == "descending" and not name.startswith("2 of 4")
    solver = ErrorFeedback("descending" if descending else "given", 24, mask_columns=8)
    check(*both(normal(8, 150, 48), CONSTRAINTS[name], solver, monkeypatch))


def test_the_compiled_loop_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_feedback.columns, "walk_by_operations", None)
    solve(WEIGHTS["normal"], gram(0, 48), CONSTRAINTS["groups"], ErrorFeedback())
    with pytest.raises(TypeError):
        solve(WEIGHTS["normal"].double(), gram(0, 48), CONSTRAINTS["groups"], ErrorFeedback())
