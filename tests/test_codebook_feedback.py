"""Codebooks under curvatures that couple weights: against the reference loops, brute force and least squares."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.constraints import Codebook, CodebookCode, Sparse
from hesse.curvature import Curvature, Gram, Kronecker
from hesse.solvers import ErrorFeedback, TwoSidedFeedback, solve
from hesse.solvers._reference import gptq, two_sided
from hesse.solvers.admm import ADMM
from hesse.solvers.refit import in_order, refit_values
from hesse.solvers.repair import Repair
from hesse.solvers.sweeps.two_sided_blocks import nearest
from hesse.solvers.two_sided_search import CodebookSearch
from hesse.testing import normal, seeds

BOOK = Codebook(2, dtype=torch.float32)


def factor(seed: int, width: int) -> Tensor:
    rows = normal(seed, 3 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 3 * width, 1)
    return rows.T @ rows / len(rows)


def kronecker(seed: int, rows: int, columns: int) -> Kronecker:
    found = Kronecker(output_factor=factor(seed, rows), input_factor=factor(seed + 5, columns))
    return found.with_damped_factors(0.1, 0.01)


def gram(seed: int, columns: int) -> Gram:
    return Gram(second_moment=factor(seed, columns), tokens=1000).damped(0.01)


def reference(weight: Tensor, curvature: Kronecker, values: Tensor) -> Tensor:
    """The codes (out, in) by the reference loop, columns with the largest A_jj first, rows with the largest G_ii."""
    codes = torch.zeros(weight.shape, dtype=torch.long)

    def nearest(value: Tensor, row: int, column: int) -> Tensor:
        codes[row, column] = (value - values[row].double()).abs().argmin()
        return values[row, codes[row, column]].double()

    orders = (f.diagonal().argsort(descending=True).tolist() for f in curvature.factors)
    two_sided(weight, *curvature.factors, *orders, nearest)
    return codes


@pytest.mark.parametrize("shape", [(5, 8), (8, 6), (1, 7), (3, 150)])
@pytest.mark.parametrize("seed", [0, 10])
def test_both_sides_are_the_reference_loop(shape: tuple[int, int], seed: int) -> None:
    weight, curvature = normal(seed + 3, *shape), kronecker(seed, *shape)
    plain = BOOK.encode(weight)
    search = CodebookSearch(TwoSidedFeedback().init(curvature), BOOK, weight)
    found = search.feed_back(plain, weight)
    assert torch.equal(found.values, plain.values)
    agreeing = (found.codes.long() == reference(weight, curvature, plain.values)).double().mean()
    assert agreeing == 1 if shape[1] < 100 else agreeing > 0.98  # the loops are in float32


@pytest.mark.parametrize("order", ["given", "descending"])
def test_one_side_is_the_reference_loop_of_gptq(order: str) -> None:
    weight, curvature = normal(3, 6, 24), gram(0, 24)
    codes = solve(weight, curvature, BOOK, ErrorFeedback(order, refit_steps=0)).encoded.codes.long()  # type: ignore[arg-type]
    values = BOOK.encode(weight, curvature.diagonal().expand_as(weight)).values.double()
    columns = torch.argsort(curvature.diagonal(), descending=True) if order == "descending" else torch.arange(24)
    expected = torch.zeros_like(codes)

    def nearest(work: Tensor, column: int) -> Tensor:
        expected[:, column] = (work[:, column, None] - values).abs().argmin(1)
        return values.gather(1, expected[:, column, None])[:, 0]

    gptq(weight, curvature.second_moment + curvature.damping * torch.eye(24), columns.tolist(), nearest)
    plain = BOOK.encode(weight, curvature.diagonal().expand_as(weight)).codes.long()
    assert all(torch.equal(a, b) or torch.equal(a, c) for a, b, c in zip(codes, expected, plain, strict=True))
    assert (codes != plain).any()


@settings(max_examples=30, deadline=None)
@given(seed=seeds, rows=st.integers(1, 7), columns=st.integers(5, 70))
def test_never_worse_than_the_best_tables_alone(seed: int, rows: int, columns: int) -> None:
    weight = normal(seed, rows, columns)
    both, one = kronecker(seed, rows, columns), gram(seed, columns)
    metric = one.diagonal().expand_as(weight)
    found = solve(weight, both, BOOK, TwoSidedFeedback())
    plain = BOOK.decode(BOOK.encode(weight, both.diagonal())) - weight
    assert found.predicted_loss_increase <= both.quadratic(plain) * (1 + 1e-6)
    rounded = solve(weight, one, BOOK, ErrorFeedback("descending"))
    costs = [one.row_quadratics(member - weight) for member in (rounded.weight, BOOK.nearest(weight, metric))]
    assert bool((costs[0] <= costs[1] * (1 + 1e-6)).all())
    for solution in (found, rounded):
        assert bool((solution.encoded.values.diff(dim=1) >= 0).all())
        assert torch.equal(BOOK.decode(solution.encoded).double(), solution.weight)


def test_after_enough_passes_no_single_code_can_be_bettered() -> None:
    weight, curvature = normal(7, 6, 12), kronecker(7, 6, 12)
    search = CodebookSearch(TwoSidedFeedback().init(curvature), BOOK, weight)
    best = search.price(BOOK.encode(weight))
    first = best.cost
    for _ in range(12):
        best = search.cheaper(best, search.descend(best))
    assert best.cost < first
    for row, column, other in product(range(6), range(12), range(4)):
        codes = best.code.codes.clone()
        codes[row, column] = other
        assert search.price(CodebookCode(codes, best.code.values)).cost >= best.cost * (1 - 1e-5)


@pytest.mark.parametrize("curvature", [kronecker(1, 5, 40), gram(1, 40)], ids=["both sides", "inputs"])
def test_values_are_the_least_squares_fit_to_the_codes(curvature: Curvature) -> None:
    weight = normal(4, 5, 40)
    code = BOOK.encode(weight)
    slope = curvature.matvec(BOOK.decode(code).double() - weight)
    found = refit_values(code, slope, curvature, 200)
    members = [torch.nn.functional.one_hot(code.codes.long(), 4).double()]
    design = torch.zeros(5, 40, 20).double()
    for row in range(5):
        design[row, :, 4 * row : 4 * row + 4] = members[0][row]
    images = torch.stack([curvature.matvec(design[:, :, k]) for k in range(20)], -1).view(200, 20)
    normal_matrix, wanted = design.view(200, 20).T @ images, images.T @ weight.flatten()
    torch.testing.assert_close(found.flatten(), torch.linalg.solve(normal_matrix, wanted), rtol=1e-6, atol=1e-8)


def test_values_that_no_longer_ascend_are_put_in_order() -> None:
    code = CodebookCode(torch.tensor([[0, 1, 2, 3, 1]], dtype=torch.uint8), torch.tensor([[0.0, 1, 2, 3]]))
    values = torch.tensor([[5.0, 1, float("nan"), 0]])
    sorted_ = in_order(code, values)
    assert sorted_.values.tolist() == [[0, 1, 2, 5]]
    assert BOOK.decode(sorted_).tolist() == [[5, 1, 2, 0, 1]]


@given(seed=seeds, count=st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_the_nearest_value_is_found_by_halving(seed: int, count: int) -> None:
    values, wanted = normal(seed, count).sort().values.float(), normal(seed + 1, 20).float()
    for one in wanted:
        assert nearest(values.numpy(), one.numpy()[()]) == int((values - one).abs().argmin())


@pytest.mark.parametrize("curvature", [kronecker(2, 8, 32), gram(2, 32)], ids=["both sides", "inputs"])
def test_outliers_beside_a_codebook_lower_its_cost(curvature: Curvature) -> None:
    weight = normal(5, 8, 32)
    weight[3, 4], weight[6, 20] = 9.0, -8.0
    base = TwoSidedFeedback() if isinstance(curvature, Kronecker) else ErrorFeedback()
    alone = solve(weight, curvature, BOOK, base)
    beside = solve(weight, curvature, BOOK + Sparse(0.98), Repair(base, ADMM()))
    assert beside.predicted_loss_increase < alone.predicted_loss_increase
    assert int((beside.encoded.correction.mask).sum()) == round(0.02 * weight.numel())
