"""The kernels beside the plain sweeps: in Triton's interpreter, or on the GPU where there is one.

The interpreter and the loops compiled for a CPU round after each operation, so that codes are equal. A GPU adds a
product in one rounding, and a weight that lies half-way may go to the other side.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid, GridCode, Sparse
from hesse.curvature import Gram, Kronecker
from hesse.solvers import ErrorFeedback, Solution, Solver, TwoSidedFeedback, solve
from hesse.solvers.sweeps import kernels
from hesse.solvers.sweeps import two_sided as plain_two_sided
from hesse.solvers.sweeps.two_sided import GridLevels
from sweep_cases import CONSTRAINTS, WEIGHTS, normal, whole

two_sided = pytest.importorskip("hesse.solvers.sweeps.kernels.two_sided", reason="needs Triton: see CONTRIBUTING.md")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
on_a_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def moment(seed: int, width: int) -> Tensor:
    inputs = normal(seed, 4 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 4 * width, 1)
    return (inputs.T @ inputs / len(inputs)).to(DEVICE)


def both(
    monkeypatch: pytest.MonkeyPatch, weight: Tensor, curvature: Gram | Kronecker, constraint: Constraint, solver: Solver
) -> tuple[Solution, Solution]:
    """By the kernels and by the plain sweeps."""
    found = []
    for answer in (True, False):
        monkeypatch.setattr(kernels, "run_on", lambda device, answer=answer: answer)
        found.append(solve(weight, curvature, constraint, solver))
    return found[0], found[1]


def check(found: Solution, plain: Solution) -> None:
    if GPU:
        assert found.predicted_loss_increase == pytest.approx(plain.predicted_loss_increase, rel=1e-2, nan_ok=True)
        return
    if isinstance(plain.encoded, GridCode):
        assert torch.equal(found.encoded.codes, plain.encoded.codes)
        assert torch.equal(found.encoded.scales.scale, plain.encoded.scales.scale)
    assert torch.equal(found.weight, plain.weight)


# One side


def gram(seed: int, width: int) -> Gram:
    return Gram(second_moment=moment(seed, width), tokens=4 * width).damped(0.01)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("constraint", [CONSTRAINTS["groups"], CONSTRAINTS["asymmetric"]], ids=str)
def test_columns_of_any_weight(name: str, constraint: Constraint, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WEIGHTS[name].to(DEVICE)
    check(*both(monkeypatch, weight, gram(0, 48), constraint, ErrorFeedback("descending", 32)))


@pytest.mark.parametrize("order", ["given", "descending"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_columns_under_any_constraint(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    descending = order == "descending" and not name.startswith("2 of 4")
    solver = ErrorFeedback("descending" if descending else "given", 24, mask_columns=8)
    check(*both(monkeypatch, WEIGHTS["normal"].to(DEVICE), gram(1, 48), CONSTRAINTS[name], solver))


def test_columns_of_float64_stay_with_the_plain_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, curvature = (
        normal(0, 6, 8).double().to(DEVICE),
        Gram(second_moment=moment(0, 8).double(), tokens=32).damped(0.01),
    )
    found, plain = both(monkeypatch, weight, curvature, Grid(4, 8), ErrorFeedback())
    assert torch.equal(found.weight, plain.weight)


# Both sides


def kronecker(seed: int, rows: int, columns: int) -> Kronecker:
    curvature = Kronecker(output_factor=moment(seed, rows), input_factor=moment(seed + 5, columns))
    return curvature.with_damped_factors(0.3, 0.01)


def steps(seed: int, height: int, width: int, group: int, dtype: torch.dtype) -> GridLevels:
    """Settings of a 4-bit grid (groups, out), some of its scales negative."""
    groups = -(-width // group)
    scale = (normal(seed, groups, height).sign() * (normal(seed + 1, groups, height).abs() + 0.1)).to(dtype).float()
    zero = whole(seed + 2, -2, 2, groups, height)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)) // group
    return GridLevels(*(each.to(DEVICE) for each in (scale, -8 - zero, 7 - zero, order)), dtype)


def on_cpu(settings: GridLevels) -> GridLevels:
    return GridLevels(*(each.cpu() for each in settings[:4]), settings.dtype)


def unit_upper(matrix: Tensor) -> Tensor:
    return matrix.triu(1) + torch.eye(len(matrix))


SHAPES = [(1, 1), (7, 5), (16, 16), (40, 24), (24, 40), (33, 50)]


@pytest.mark.parametrize("shape", SHAPES)
def test_feedback_in_tiles_where_every_weight_is_tied(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves and whole numbers: every sum is exact in any order, so that tiles may not change a single tie."""
    monkeypatch.setattr(two_sided, "TILE", 16)
    width, height = shape
    work = whole(0, -21, 21, width, height) / 2
    columns, rows = (
        unit_upper(whole(k, -3, 3, n, n).sign() * (whole(k + 9, 0, 9, n, n) == 0)) for k, n in enumerate(shape)
    )
    bounds = torch.full((1, height), 100.0)
    settings = GridLevels(torch.ones(1, height), -bounds, bounds, torch.zeros(width, dtype=torch.int64), torch.float32)
    plain = plain_two_sided.feed_back(work.clone(), settings, columns, rows)
    assert bool((plain.abs() < 100).all())
    placed = GridLevels(*(each.to(DEVICE) for each in settings[:4]), settings.dtype)
    found = two_sided.feed_back(work.to(DEVICE), placed, columns.to(DEVICE), rows.to(DEVICE))
    assert torch.equal(found.cpu(), plain)


@pytest.mark.parametrize(
    ("shape", "tile", "dtype"),
    [
        *((shape, 16, torch.float32) for shape in SHAPES),
        ((33, 50), 32, torch.bfloat16),
        ((24, 40), 16, torch.float16),
    ],
)
def test_feedback_in_tiles(
    shape: tuple[int, int], tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_sided, "TILE", tile)
    width, height = shape
    settings = steps(0, height, width, 6, dtype)
    work, columns, rows = (
        normal(1, width, height),
        unit_upper(normal(2, width, width) / 5),
        unit_upper(normal(3, height, height) / 5),
    )
    plain = plain_two_sided.feed_back(work.clone(), on_cpu(settings), columns, rows)
    found = two_sided.feed_back(work.to(DEVICE), settings, columns.to(DEVICE), rows.to(DEVICE)).cpu()
    if GPU:
        assert (found != plain).float().mean() < 0.05
    else:
        assert torch.equal(found, plain)


@pytest.mark.parametrize(("shape", "chunk"), [*((shape, 8) for shape in SHAPES), ((24, 40), 512), ((70, 20), 512)])
def test_descent(shape: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sided, "CHUNK", chunk)
    dtype = torch.bfloat16 if chunk == 8 else torch.float32
    width, height = shape
    settings = steps(0, height, width, 6, dtype)
    inputs, outputs = moment(1, width).cpu(), moment(2, height).cpu()
    spread = on_cpu(settings)
    weight, scale = normal(4, width, height), spread.scale[spread.group]
    codes = (weight / scale).round().clamp(spread.lowest[spread.group], spread.highest[spread.group])
    gradient = inputs @ (codes * scale - weight) @ outputs
    plain, found = codes.clone(), codes.to(DEVICE, copy=True)
    plain_two_sided.descend(plain, gradient.clone(), spread, inputs, outputs)
    two_sided.descend(found, gradient.to(DEVICE), settings, inputs.to(DEVICE), outputs.to(DEVICE))
    assert (width * height == 1) == torch.equal(plain, codes)
    if GPU:
        assert (found.cpu() != plain).float().mean() < 0.05
    else:
        assert torch.equal(found.cpu(), plain)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, 16, headroom=1.0, signed=True),
        Grid(2, -1, signed=True, dtype=torch.bfloat16),
        Grid(3, 20, symmetric=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(20, 36), (72, 66)])
def test_two_sided_rounding(shape: tuple[int, int], grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*both(monkeypatch, normal(0, *shape).to(DEVICE), kronecker(1, *shape), grid, TwoSidedFeedback()))


# On a GPU alone


def test_they_compile_for_a_gpu() -> None:
    program = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, str(program)], env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["_walk", "_walk", "_walk", "_solve_tiles", "_descend"]


@on_a_gpu
def test_a_gpu_is_used() -> None:
    assert kernels.run_on(DEVICE)
    assert not kernels.run_on(torch.device("cpu"))


@on_a_gpu
@pytest.mark.parametrize("constraint", [Grid(4, 128, dtype=torch.bfloat16), Sparse(2, 4) & Grid(4, 128)], ids=str)
def test_a_wide_layer_by_columns(constraint: Constraint, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(0, 1024, 1024).to(DEVICE)
    found, plain = both(monkeypatch, weight, gram(0, 1024), constraint, ErrorFeedback())
    assert found.predicted_loss_increase == pytest.approx(plain.predicted_loss_increase, rel=1e-3)


@on_a_gpu
def test_a_wide_layer_by_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = normal(0, 1024, 1024).to(DEVICE), Grid(4, 128, headroom=1.0, signed=True, dtype=torch.bfloat16)
    found, plain = both(monkeypatch, weight, kronecker(0, 1024, 1024), grid, TwoSidedFeedback())
    assert found.weight.device == weight.device
    assert found.predicted_loss_increase == pytest.approx(plain.predicted_loss_increase, rel=1e-3)
