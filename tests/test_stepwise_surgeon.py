"""WoodFisher and M-FAC: weights pruned together, against dense inverses in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.constraints import Constraint, Grid, Sparse
from hesse.curvature import BlockRankOneSum, Curvature, Gram, RankOneSum
from hesse.errors import OptionError, UnsupportedProduct
from hesse.solvers import GreedySurgeon, StepwiseSurgeon, SummedSurgeon, solve
from hesse.testing import normal

SHAPE = (5, 8)
BLOCKS = BlockRankOneSum.from_gradients(normal(6, 30, *SHAPE), 8).damped(0.05)
WHOLE = RankOneSum.from_gradients(normal(7, 12, *SHAPE) + normal(8, 12, 1, 1)).damped(0.05)
CURVATURES = pytest.mark.parametrize("curvature", [BLOCKS, WHOLE], ids=["blocks", "whole"])


def dense(curvature: Curvature) -> Tensor:
    return curvature.matrix() + curvature.damping * torch.eye(40).double()


def statistic(weight: Tensor, hessian: Tensor) -> Tensor:
    return weight.square() / (2 * torch.linalg.inv(hessian).diagonal())


def joint(weight: Tensor, hessian: Tensor, gone: Tensor) -> Tensor:
    """W - H⁻¹E_Q ([H⁻¹]_QQ)⁻¹ w_Q."""
    inverse = torch.linalg.inv(hessian)
    moved = weight - inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], weight[gone])
    return torch.where(gone, 0, moved)


@CURVATURES
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_one_step_is_the_statistic_and_the_joint_update(curvature: Curvature, scope: str) -> None:
    weight, hessian = normal(5, *SHAPE), dense(curvature)
    constraint = Sparse(0.5, scope="row" if scope == "row" else "layer").stored_as(torch.float64)
    found = solve(weight, curvature, constraint, StepwiseSurgeon()).weight.flatten()
    mask = constraint.mask(statistic(weight.flatten(), hessian).view(SHAPE)).flatten()
    assert torch.equal(found != 0, mask)
    torch.testing.assert_close(found, joint(weight.flatten(), hessian, ~mask), rtol=1e-7, atol=1e-9)


@CURVATURES
def test_the_sum_of_single_updates_is_woodfishers(curvature: Curvature) -> None:
    weight, hessian = normal(5, *SHAPE), dense(curvature)
    found = solve(weight, curvature, Sparse(0.5).stored_as(torch.float64), SummedSurgeon()).weight
    inverse, flat = torch.linalg.inv(hessian), weight.flatten()
    gone = (found == 0).flatten()
    expected = flat.clone()
    for place in gone.nonzero().flatten().tolist():
        expected -= flat[place] / inverse[place, place] * inverse[:, place]
    torch.testing.assert_close(found.flatten(), torch.where(gone, 0, expected), rtol=1e-7, atol=1e-9)


@CURVATURES
@pytest.mark.parametrize("amount", [0.3, 0.8])
def test_steps_count_what_is_left(curvature: Curvature, amount: float) -> None:
    """The slow statement: the inverse of what is left of H, at each step."""
    weight, hessian, steps = normal(9, 40), dense(curvature), 4
    gone, values = torch.zeros(40, dtype=torch.bool), weight
    for step in range(1, steps + 1):
        left = (~gone).nonzero().flatten()
        scores = statistic(values[left], hessian[left][:, left])
        number = round(40 * (1 - (1 - amount) ** (step / steps))) - int(gone.sum())
        gone[left[scores.argsort()[:number]]] = True
        values = joint(weight, hessian, gone)
    found = solve(
        weight.view(SHAPE), curvature, Sparse(amount).stored_as(torch.float64), StepwiseSurgeon(steps)
    ).weight.flatten()
    assert torch.equal(found == 0, gone)
    torch.testing.assert_close(found, values, rtol=1e-7, atol=1e-9)


@CURVATURES
def test_the_joint_update_costs_least_and_greed_less_still(curvature: Curvature) -> None:
    hessian, costs = dense(curvature), torch.zeros(4)
    solvers = (SummedSurgeon(), StepwiseSurgeon(), StepwiseSurgeon(steps=4), GreedySurgeon())
    for seed in range(6):
        weight = normal(seed, *SHAPE)
        for place, solver in enumerate(solvers[:4] if curvature is BLOCKS else solvers[:3]):
            found = solve(weight, curvature, Sparse(0.5).stored_as(torch.float64), solver).weight
            change = (found - weight).flatten()
            costs[place] += 0.5 * float(change @ hessian @ change)
    summed, together, stepped, greedy = costs.tolist()
    assert stepped < together < summed
    assert greedy < stepped


def test_a_pattern_is_kept_to_in_one_step() -> None:
    found = solve(normal(5, *SHAPE), WHOLE, Sparse(2, 4), StepwiseSurgeon(steps=8)).weight
    assert bool(((found != 0).view(5, 2, 4).sum(-1) == 2).all())


@pytest.mark.parametrize(
    ("curvature", "constraint", "said"),
    [
        (Gram(second_moment=torch.eye(8), tokens=9), Sparse(0.5), "needs a BlockRankOneSum or a RankOneSum"),
        (WHOLE, Grid(), "solves Sparse, not Grid"),
        (WHOLE, Sparse(0.5, block=4), "single weights: for blocks use GreedySurgeon"),
    ],
)
def test_what_it_cannot_do_it_says(curvature: Curvature, constraint: Constraint, said: str) -> None:
    with pytest.raises(UnsupportedProduct, match=said):
        solve(normal(5, *SHAPE), curvature, constraint, StepwiseSurgeon())


def test_gradients_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not enough for this model and method"):
        hesse.compress(DEFAULT_FOLDER, tmp_path / "out", method="m-fac", samples=512, length=32, memory="600MiB")
    assert not (tmp_path / "out").exists()
