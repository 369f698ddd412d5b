"""Zeros in blocks of neighbours: masks, exact surgery against brute force, and what refuses them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.constraints import Grid, GridCode, Sparse
from hesse.curvature import BlockRankOneSum, Curvature, Diagonal, Gram
from hesse.errors import OptionError, UnsupportedProduct
from hesse.layerwise.layer_solver import check_products
from hesse.methods import Options, find_method
from hesse.solvers import ADMM, ErrorFeedback, GreedySurgeon, Nearest, Solver, solve
from hesse.testing import normal

IN, OUT = 12, 6


def gram(seed: int, width: int = IN) -> Gram:
    rows = normal(seed, 4 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 4 * width, 1)
    return Gram(second_moment=rows.T @ rows / len(rows), tokens=4 * width).damped(0.01)


def removal(row: Tensor, hessian: Tensor, gone: list[int]) -> tuple[float, Tensor]:
    """½ w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q, and w - H⁻¹E_Q ([H⁻¹]_QQ)⁻¹ w_Q."""
    inverse = torch.linalg.inv(hessian)
    pulled = torch.linalg.solve(inverse[gone][:, gone], row[gone])
    return 0.5 * float(row[gone] @ pulled), row - inverse[:, gone] @ pulled


def greedy_blocks(row: Tensor, hessian: Tensor, block: int, number: int) -> tuple[list[list[int]], Tensor]:
    """The blocks that go first, each time the cheapest given all that are gone, and what the rest becomes."""
    blocks = [list(range(start, start + block)) for start in range(0, len(row), block)]
    chosen: list[list[int]] = []
    for _ in range(number):
        gone = [place for own in chosen for place in own]
        chosen.append(
            min((own for own in blocks if own not in chosen), key=lambda own: removal(row, hessian, gone + own)[0])
        )
    return chosen, removal(row, hessian, [place for own in chosen for place in own])[1]


def blocks_of(weight: Tensor, block: int) -> Tensor:
    """How many weights of each block are zero."""
    return (weight == 0).reshape(len(weight), -1, block).sum(-1)


@pytest.mark.parametrize("block", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_loses_the_blocks_that_exact_surgery_removes(block: int, seed: int) -> None:
    weight, curvature = normal(seed, OUT, IN), gram(10 + seed)
    hessian = curvature.second_moment + curvature.damping * torch.eye(IN).double()
    constraint = Sparse(0.5, scope="row", block=block).stored_as(torch.float64)
    found = solve(weight, curvature, constraint, GreedySurgeon()).weight
    for row, result in zip(weight, found, strict=True):
        chosen, expected = greedy_blocks(row, hessian, block, round(IN / 2 / block))
        assert set((result == 0).nonzero().flatten().tolist()) == {place for own in chosen for place in own}
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [4, 8, 20])
def test_fisher_blocks_lose_groups_of_four_as_obert_does(size: int) -> None:
    weight, gradients = normal(5, 5, 8), normal(6, 30, 5, 8)
    curvature = BlockRankOneSum.from_gradients(gradients, size).damped(0.05)
    constraint = Sparse(0.5, block=4).stored_as(torch.float64)
    found = solve(weight, curvature, constraint, GreedySurgeon()).weight
    hessian = curvature.matrix() + curvature.damping * torch.eye(40).double()
    steps, flat = [], weight.flatten()
    for number, start in enumerate(range(0, 40, size)):
        inside = hessian[start : start + size, start : start + size]
        row = flat[start : start + size]
        order, _ = greedy_blocks(row, inside, 4, size // 4)
        costs = [removal(row, inside, [p for own in order[: k + 1] for p in own])[0] for k in range(len(order))]
        rises = [after - before for before, after in zip([0.0, *costs], costs, strict=False)]
        highest = [max(rises[: k + 1]) for k in range(len(rises))]
        steps += [(price, number, start + own[0]) for price, own in zip(highest, order, strict=True)]
    gone = {place + k for *_, place in sorted(steps)[:5] for k in range(4)}
    assert set((found.flatten() == 0).nonzero().flatten().tolist()) == gone
    torch.testing.assert_close(
        found.flatten(), removal(flat, hessian, sorted(gone))[1].where(found.flatten() != 0, torch.tensor(0.0).double())
    )


SOLVERS: list[tuple[Solver, Curvature]] = [
    (Nearest(), Diagonal(values=normal(1, 8, 24).exp())),
    (ErrorFeedback(), gram(3, 24)),
    (ErrorFeedback(order="descending"), gram(3, 24)),
    (ADMM(), gram(3, 24)),
    (GreedySurgeon(), gram(3, 24)),
]


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("block", [3, 4, 24])
@pytest.mark.parametrize(("solver", "curvature"), SOLVERS[:2] + SOLVERS[3:], ids=lambda part: type(part).__name__)
def test_every_zero_has_its_whole_block(solver: Solver, curvature: Curvature, block: int, scope: str) -> None:
    constraint = Sparse(0.5, scope="row" if scope == "row" else "layer", block=block)
    weight = normal(2, 8, 24)
    found = blocks_of(solve(weight, curvature, constraint, solver).weight, block)
    assert set(found.unique().tolist()) <= {0, block}
    number = round(0.5 * (24 if scope == "row" else 192) / block)
    dropped = (found == block).sum(1) if scope == "row" else (found == block).sum()[None]
    assert dropped.tolist() == [number] * len(dropped)


def test_a_diagonal_metric_loses_the_blocks_of_the_least_sums() -> None:
    metric, weight = normal(1, 8, 24).exp(), normal(2, 8, 24)
    found = solve(weight, Diagonal(values=metric), Sparse(0.25, block=4), Nearest()).weight
    sums = (weight.square() * metric).reshape(8, 6, 4).sum(-1)
    assert torch.equal(blocks_of(found, 4) == 4, sums <= sums.flatten().sort().values[11])


def test_a_pruned_grid_keeps_its_blocks() -> None:
    constraint = Sparse(0.5, block=4) & Grid(4, 8)
    found = ErrorFeedback().compute(ErrorFeedback().init(gram(3, 24)), normal(2, 8, 24), constraint)
    assert isinstance(found, GridCode)
    assert int((blocks_of(found.codes, 4) == 4).sum()) >= 24


def test_surgery_on_blocks_beats_sums_of_single_costs() -> None:
    ours = theirs = 0.0
    for seed in range(6):
        weight, curvature = normal(seed, 16, 24), gram(60 + seed, 24)
        constraint = Sparse(0.5, block=4)
        ours += solve(weight, curvature, constraint, GreedySurgeon()).predicted_loss_increase
        theirs += solve(weight, curvature, constraint, ErrorFeedback()).predicted_loss_increase
    assert ours < theirs


def test_bits_of_blocks_are_fewer() -> None:
    shape = torch.Size([8, 24])
    assert Sparse(0.5).stored_as(torch.bfloat16).bits_per_weight(shape) == pytest.approx(9.0)
    assert Sparse(0.5, block=4).stored_as(torch.bfloat16).bits_per_weight(shape) == pytest.approx(8.25)


def test_what_has_no_blocks_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has no blocks: leave the pattern or the block out"):
        Sparse(2, 4, block=4)
    with pytest.raises(OptionError, match="blocks of 0: use 1 or more"):
        Sparse(0.5, block=0)
    with pytest.raises(OptionError, match="width divisible by 5, and this one is 24"):
        solve(normal(2, 8, 24), gram(3, 24), Sparse(0.5, block=5), ErrorFeedback())
    with pytest.raises(OptionError, match="--block has no meaning for the method gptq"):
        find_method("gptq").recipe(Options(block=4))
    with pytest.raises(UnsupportedProduct, match="blocks of 32 weights cut the groups of 24"):
        check_products(find_method("obert").recipe(Options(block=24)).rules[0])
    for scope in ("layer", "lamp"):
        with pytest.raises(OptionError, match=r"layers.0.*width divisible by 7"):
            hesse.compress(
                DEFAULT_FOLDER, tmp_path / "out", method="magnitude", options=Options(block=7, scope=scope), length=32
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["magnitude", "obd", "wanda", "sparsegpt", "admm", "obc", "obert"])
def test_pruning_rows_take_a_block(method: str) -> None:
    rule = find_method(method).recipe(Options(block=4)).rules[0]
    check_products(rule)
    built = rule.constraint.build()
    assert isinstance(built, Sparse)
    assert built.block == 4
