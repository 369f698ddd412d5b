"""Two-sided rounding against its definition: Optimal Brain Surgeon on the whole matrix H = G ⊗ A, written out."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.compiled import lost_bits, round_stored
from hesse.constraints import Grid, GridCode, Scales, Sparse
from hesse.constraints.base import round_to
from hesse.curvature import Gram, Identity, Kronecker
from hesse.errors import ConditioningError, OptionError, UnsupportedProduct
from hesse.solvers import ADMM, ErrorFeedback, Nearest, TwoSidedFeedback, solve
from hesse.solvers._reference import two_sided
from hesse.solvers.refit import refit_scales
from hesse.solvers.two_sided_search import GridSearch

seeds = st.integers(0, 2**31 - 1)
FEEDBACK_ALONE = TwoSidedFeedback(passes=0, refit_steps=0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(seed: int, width: int) -> Tensor:
    rows = normal(seed, 3 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 3 * width, 1)
    return rows.T @ rows / len(rows)


def kronecker(seed: int, rows: int, columns: int) -> Kronecker:
    return Kronecker(output_factor=factor(seed, rows), input_factor=factor(seed + 5, columns)).with_damped_factors(
        0.1, 0.01
    )


def reference(weight: Tensor, curvature: Kronecker, grid: Grid, scales: Scales) -> Tensor:
    """The codes (out, in) by the reference loop, columns with the largest A_jj first, rows with the largest G_ii."""
    each, codes = grid.expand_scales(Scales(scales.scale, scales.zeros), weight.shape[1]), torch.zeros_like(weight)
    assert each.zero_point is not None
    scale, zero = each.scale.double(), each.zero_point.double()

    def nearest(value: Tensor, row: int, column: int) -> Tensor:
        codes[row, column] = grid.codes(value, scale[row, column], zero[row, column])
        return grid.values(codes[row, column], scale[row, column], zero[row, column])

    orders = (f.diagonal().argsort(descending=True).tolist() for f in curvature.factors)
    two_sided(weight, *curvature.factors, *orders, nearest)
    return codes


@pytest.mark.parametrize("grid", [Grid(3, 4, signed=True, headroom=1.0), Grid(4, -1), Grid(3, 4, symmetric=False)])
@pytest.mark.parametrize("shape", [(5, 8), (8, 6), (1, 7), (6, 1)])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_it_is_the_reference_loop_of_the_two_sided_update(grid: Grid, shape: tuple[int, int], seed: int) -> None:
    grid = grid.stored_as(torch.float32)
    weight, curvature = normal(seed + 3, *shape), kronecker(seed, *shape)
    state = TwoSidedFeedback().init(curvature)
    scales = grid.fit(weight)
    found = GridSearch(state, grid, weight).feed_back(grid.round(weight, scales), weight).codes
    assert torch.equal(found.double(), reference(weight, curvature, grid, scales))


def test_wide_layers_cross_blocks_of_columns() -> None:
    """Beyond one block the errors of columns reach the others by a product; the walk over one row is GPTQ's."""
    weight, inputs = normal(0, 3, 150).float(), factor(1, 150).float()
    grid = Grid(4, 50).stored_as(torch.float32)
    curvature = Kronecker(output_factor=torch.ones(3), input_factor=inputs).with_damped_factors(0.0, 0.01)
    search = GridSearch(TwoSidedFeedback().init(curvature), grid, weight)
    ours = search.feed_back(grid.round(weight, grid.fit(weight)), weight)
    theirs = solve(weight, Gram(second_moment=curvature.input_factor, tokens=1000), grid, ErrorFeedback("descending"))
    assert (ours.codes != theirs.encoded.codes).double().mean() < 0.01  # where a weight lies half-way
    assert curvature.quadratic(grid.decode(ours) - weight) == pytest.approx(theirs.predicted_loss_increase, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    bits=st.integers(2, 8),
    group=st.sampled_from([-1, 1, 4, 5]),
    symmetric=st.booleans(),
    passes=st.integers(0, 3),
)
def test_it_is_never_worse_than_rounding_to_nearest(
    seed: int, rows: int, columns: int, bits: int, group: int, symmetric: bool, passes: int
) -> None:
    grid = Grid(bits, group, symmetric, headroom=1.0, signed=True)
    weight, curvature = normal(seed, rows, columns).float(), kronecker(seed + 1, rows, columns)
    curvature = replace(
        curvature, output_factor=curvature.output_factor.float(), input_factor=curvature.input_factor.float()
    )
    found = solve(weight, curvature, grid, TwoSidedFeedback(passes))
    nearest = solve(weight, Identity(), grid, Nearest()).weight
    assert found.predicted_loss_increase <= curvature.quadratic(nearest - weight) * (1 + 1e-5) + 1e-12
    assert torch.equal(grid.decode(found.encoded), found.weight)


@pytest.mark.parametrize("seed", range(4))
def test_after_enough_passes_no_single_code_can_be_bettered(seed: int) -> None:
    weight, curvature = normal(seed, 4, 6), kronecker(seed, 4, 6)
    grid = Grid(3, 3, signed=True).stored_as(torch.float32)
    loops = GridSearch(TwoSidedFeedback().init(curvature), grid, weight)
    priced = [loops.price(grid.round(weight, grid.fit(weight)))]
    for _ in range(12):
        priced.append(loops.price(loops.descend(priced[-1])))
    code, costs = priced[-1].code, [each.cost for each in priced]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(costs))
    assert costs[-1] < costs[0]
    for row, column, other in product(range(4), range(6), range(-4, 4)):
        codes = code.codes.clone()
        codes[row, column] = other
        assert loops.price(GridCode(codes, code.scales)).cost >= costs[-1] * (1 - 1e-5)


def test_it_lies_between_the_best_of_all_roundings_and_feedback_on_columns_alone() -> None:
    best, two_sided, one_sided, plain = 0.0, 0.0, 0.0, 0.0
    for seed in range(12):
        weight, curvature = normal(seed, 2, 3), kronecker(seed, 2, 3)
        grid = Grid(2, -1, signed=True, headroom=1.0).stored_as(torch.float32)
        scales = grid.fit(weight)
        every = [
            curvature.quadratic(
                grid.decode(GridCode(torch.tensor(codes, dtype=torch.int8).view(2, 3), scales)) - weight
            )
            for codes in product(range(-2, 2), repeat=6)
        ]
        best += min(every)
        two_sided += solve(weight, curvature, grid, TwoSidedFeedback(2, 0)).predicted_loss_increase
        gram = Gram(second_moment=curvature.input_factor, tokens=100)
        one_sided += curvature.quadratic(solve(weight, gram, grid, ErrorFeedback("descending")).weight - weight)
        plain += curvature.quadratic(grid.decode(grid.encode(weight)) - weight)
    assert best <= two_sided * (1 + 1e-6)
    assert two_sided < one_sided < plain
    assert two_sided < 1.3 * best


@pytest.mark.parametrize("grid", [Grid(4, 5, signed=True), Grid(3, 4, symmetric=False)], ids=str)
def test_refitted_scales_are_the_least_squares_solution(grid: Grid) -> None:
    grid = grid.stored_as(torch.float32)
    weight, curvature = normal(0, 4, 12), kronecker(1, 4, 12)
    code = grid.encode(weight)
    zero = 0 if code.scales.zero_point is None else grid.expand(code.scales.zero_point, 12)
    codes = code.codes.double() - zero
    groups = grid.groups(12)
    directions = torch.stack(
        [
            codes * grid.expand(torch.eye(4 * groups, dtype=torch.float64)[k].view(4, groups), 12)
            for k in range(4 * groups)
        ]
    ).flatten(1)
    hessian = curvature.matrix()
    wanted = torch.linalg.solve(directions @ hessian @ directions.T, directions @ hessian @ weight.flatten())
    found = refit_scales(code, curvature.matvec(grid.decode(code) - weight), curvature, grid, 60)
    torch.testing.assert_close(found, wanted.view(4, groups), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sparse", [Sparse(0.5), Sparse(2, 4)], ids=str)
@pytest.mark.parametrize("grid", [Grid(4, 4, signed=True, headroom=1.0), Grid(4, -1, symmetric=False)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_zeros_hold_and_what_is_kept_costs_no_more_than_rounding_what_was_pruned(
    seed: int, grid: Grid, sparse: Sparse
) -> None:
    weight, curvature = normal(seed, 8, 16).float(), kronecker(seed, 8, 16)
    found = solve(weight, curvature, sparse & grid, TwoSidedFeedback())
    pruned = solve(weight, curvature, sparse, ADMM()).weight
    assert (found.weight[pruned == 0] == 0).all()
    scales = grid.fit(pruned)
    plain = grid.decode(grid.round(pruned, scales))
    assert found.predicted_loss_increase <= curvature.quadratic(plain - weight) * (1 + 1e-5)
    assert torch.equal(grid.decode(found.encoded), found.weight)


def test_no_single_kept_code_can_be_bettered_after_enough_passes() -> None:
    weight, curvature, grid = normal(2, 4, 8), kronecker(2, 4, 8), Grid(3, 4, signed=True).stored_as(torch.float32)
    pruned = solve(weight, curvature, Sparse(2, 4), ADMM()).weight
    loops = GridSearch(TwoSidedFeedback().init(curvature), grid, weight, pruned != 0)
    priced = loops.price(grid.round(pruned, grid.fit(pruned)))
    for _ in range(12):
        priced = loops.price(loops.descend(priced))
    assert (priced.code.codes[pruned == 0] == 0).all()
    for (row, column), other in product((pruned != 0).nonzero().tolist(), range(-4, 4)):
        codes = priced.code.codes.clone()
        codes[row, column] = other
        assert loops.price(GridCode(codes, priced.code.scales)).cost >= priced.cost * (1 - 1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, steps=st.integers(0, 6))
def test_refitting_scales_never_costs(seed: int, steps: int) -> None:
    grid = Grid(3, 4, signed=True).stored_as(torch.float32)
    weight, curvature = normal(seed, 3, 10), kronecker(seed + 1, 3, 10)
    weight[:, 4:8] = 0  # a group of zeros, whose scale no code uses
    code = grid.encode(weight)
    scale = refit_scales(code, curvature.matvec(grid.decode(code) - weight), curvature, grid, steps)
    after = curvature.quadratic(code.codes * grid.expand(scale, 10) - weight)
    assert after <= curvature.quadratic(grid.decode(code) - weight) * (1 + 1e-6)
    assert torch.equal(scale[:, 1], code.scales.scale[:, 1].double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loops_round_values_as_they_are_stored(dtype: torch.dtype) -> None:
    values = torch.cat([normal(0, 2000).float(), torch.arange(-999, 999) / 256, 1 + torch.arange(99) / 2**11])
    found = torch.tensor([float(round_stored(value, lost_bits(dtype))) for value in values.numpy()])
    assert torch.equal(found, round_to(values, dtype))
    for as_precise in (torch.float32, torch.float64):
        assert float(round_stored(values.numpy()[0], lost_bits(as_precise))) == float(values[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_scales_put_the_largest_weight_on_the_outermost_code(bits: int) -> None:
    weight = normal(bits, 6, 16).float()
    grid = Grid(bits, 8, headroom=1.0, signed=True).stored_as(torch.float32)
    code = grid.encode(weight)
    largest = weight.view(6, 2, 8).abs().amax(-1)
    outermost = (code.codes.view(6, 2, 8) == grid.lowest).any(-1)
    assert bool(outermost.all())
    torch.testing.assert_close(grid.decode(code).view(6, 2, 8).abs().amax(-1), largest)
    same_sign = Grid(bits, 8, symmetric=False, signed=True)
    assert same_sign.fit(weight).scale.min() > 0  # an asymmetric grid has a zero point instead


def test_damped_factors_are_the_factors_with_a_ridge() -> None:
    curvature = Kronecker(output_factor=factor(0, 3), input_factor=factor(1, 4))
    damped = curvature.with_damped_factors(0.5, 0.25)
    outputs = curvature.output_factor + 0.5 * curvature.output_factor.trace() / 3 * torch.eye(3, dtype=torch.float64)
    inputs = curvature.input_factor + 0.25 * curvature.input_factor.trace() / 4 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(damped.matrix(), torch.kron(outputs, inputs))
    diagonal = Kronecker(output_factor=torch.tensor([1.0, 3.0]), input_factor=torch.eye(2)).with_damped_factors(1.0, 0)
    assert diagonal.output_factor.tolist() == [3.0, 5.0]
    with pytest.raises(OptionError, match="finite and not negative"):
        curvature.with_damped_factors(-1.0, 0.0)


def test_refusals() -> None:
    weight = normal(0, 4, 6)
    singular = Kronecker(output_factor=torch.zeros(4, 4), input_factor=torch.eye(6))
    with pytest.raises(ConditioningError, match="with_damped_factors"):
        solve(weight, singular, Grid(), TwoSidedFeedback())
    with pytest.raises(UnsupportedProduct, match="needs a Kronecker with an input factor"):
        solve(weight, Gram(second_moment=factor(0, 6), tokens=10), Grid(), TwoSidedFeedback())
    with pytest.raises(UnsupportedProduct, match="solves Grid, Sparse & Grid and Codebook, not Sparse"):
        solve(weight, kronecker(0, 4, 6), Sparse(0.5), TwoSidedFeedback())


def test_the_loops_compile_where_no_cache_can_be_written() -> None:
    program = (
        "import numba.core.caching as c; c.FunctionCache._impl_class._locator_classes = []\n"
        "import torch, hesse.compiled as s, numpy as np\n"
        "print(s.round_stored(np.float32(1.0), np.uint32(0)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1.0"
