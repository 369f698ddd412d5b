"""Signs times an outer product, and columns on a grid beside them: against SVD, least squares and counted bits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hesse.constraints import Grid, SalientCode, SalientColumns, SignRankOne
from hesse.constraints.sign_rank_one import rank_one
from hesse.curvature import CrossEntropy, Diagonal, Gram, Identity
from hesse.errors import OptionError, UnsupportedProduct
from hesse.solvers import Nearest, RefitSalient, solve
from hesse.testing import normal, seeds
from hesse.training import HeldSigns, OneBit, Training, finetune

DOUBLE = torch.float64


def error(weight: Tensor, member: Tensor, metric: Tensor | float = 1.0) -> float:
    return float((metric * (member - weight).square()).sum())


@settings(max_examples=25, deadline=None, database=None)
@given(seed=seeds, rows=st.integers(1, 9), columns=st.integers(1, 9), weighted=st.booleans())
def test_the_outer_product_is_the_best_there_is(seed: int, rows: int, columns: int, weighted: bool) -> None:
    """By SVD of |W|, or of |W| scaled by a metric for rows times one for columns."""
    weight = normal(seed, rows, columns)
    sides = [
        (normal(seed + k, n).square() + 0.1 if weighted else torch.ones(n).double())
        for k, n in ((1, rows), (2, columns))
    ]
    metric = torch.outer(*sides)
    left, sizes, right = torch.linalg.svd(weight.abs() * metric.sqrt())
    best = sizes[0] * torch.outer(left[:, 0], right[0]) / metric.sqrt()
    member = SignRankOne(dtype=DOUBLE).nearest(weight, metric if weighted else None)
    assert error(weight, member, metric) <= error(weight.abs(), best, metric) * (1 + 1e-6) + 1e-12
    assert torch.equal(member >= 0, weight >= 0)


def test_any_metric_ends_where_neither_side_can_be_better() -> None:
    weight, metric = normal(0, 7, 11), normal(1, 7, 11).square()
    metric[:, 3] = 0
    constraint = SignRankOne(dtype=DOUBLE)
    code = constraint.encode(weight, metric)
    size, (a, b) = weight.abs(), (code.rows, code.columns)
    torch.testing.assert_close(a, (metric * size) @ b / (metric @ b.square()), rtol=1e-5, atol=1e-8)
    wanted = a @ (metric * size) / (a.square() @ metric)
    wanted[3] = 0  # where nothing is asked for
    torch.testing.assert_close(b, wanted, rtol=1e-4, atol=1e-8)
    plain = constraint.nearest(weight)
    assert error(weight, constraint.decode(code), metric) < error(weight, plain, metric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_members_come_back_as_they_are_stored(dtype: torch.dtype) -> None:
    weight = normal(0, 6, 10).float()
    for constraint in (SignRankOne(dtype=dtype), SalientColumns(0.3).stored_as(dtype)):
        member = constraint.nearest(weight)
        assert torch.equal(member, member.to(dtype).float())
    zero = torch.zeros(3, 4)
    assert torch.equal(SignRankOne(dtype=dtype).nearest(zero), zero)


def test_bits_are_those_of_what_is_stored() -> None:
    weight = normal(0, 16, 40).float()
    constraint = SalientColumns(0.2).stored_as(torch.float16)
    code = constraint.encode(weight)
    assert int(code.salient.sum()) == 8
    numbers = code.grid.scales.scale.numel() + code.rest.rows.numel() + code.rest.columns.numel()
    bits = 4 * code.grid.codes.numel() + code.rest.positive.numel() + code.salient.numel() + 16 * numbers
    assert constraint.bits_per_weight(weight.shape) == pytest.approx(bits / weight.numel())
    large = constraint.bits_per_weight(torch.Size((4096, 4096)))
    assert large == pytest.approx(0.2 * 4 + 0.8 * 1, abs=0.015)  # 1.61, as the paper counts


def test_salient_columns_are_those_of_the_largest_inputs() -> None:
    weight, metric = normal(0, 6, 10), torch.ones(10).double()
    metric[[2, 7]] = 5.0
    code = SalientColumns(0.2).encode(weight, metric)
    assert code.salient.nonzero().flatten().tolist() == [2, 7]
    loud = weight.clone()
    loud[:, [1, 4]] *= 10
    assert SalientColumns(0.2).encode(loud).salient.nonzero().flatten().tolist() == [1, 4]
    found = solve(weight, Diagonal(values=metric), SalientColumns(0.2).stored_as(DOUBLE), Nearest())
    torch.testing.assert_close(
        found.weight[:, [2, 7]], Grid(4, -1, headroom=0.06, dtype=DOUBLE).nearest(weight[:, [2, 7]])
    )


def fitted(seed: int = 0) -> tuple[Tensor, Gram, SalientColumns]:
    inputs = normal(seed, 60, 20) @ normal(seed + 1, 20, 20) * torch.linspace(0.2, 3, 20).double()
    return (
        normal(seed + 2, 12, 20),
        Gram.from_inputs(inputs),
        SalientColumns(0.2, Grid(4, -1, headroom=0.06, dtype=DOUBLE), dtype=DOUBLE),
    )


def parameters(code: SalientCode) -> tuple[Tensor, ...]:
    return code.grid.scales.scale, code.rest.rows, code.rest.columns


def decoded(code: SalientCode, scale: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The member, by its formula."""
    member = torch.zeros(len(rows), len(code.salient), dtype=DOUBLE)
    member[:, code.salient] = scale * code.grid.codes.double()
    member[:, ~code.salient] = torch.outer(rows, columns) * (code.rest.positive.double() * 2 - 1)
    return member


def test_numbers_of_rows_and_columns_end_where_their_gradient_under_the_gram_is_zero() -> None:
    weight, gram, constraint = fitted()
    code = solve(weight, gram, constraint, RefitSalient(rounds=400)).encoded
    free = [part.double().requires_grad_() for part in parameters(code)]
    change = decoded(code, *free) - weight
    cost = 0.5 * (change @ gram.second_moment * change).sum()
    start = 0.5 * (weight @ gram.second_moment * weight).sum()
    for part, gradient in zip(free, torch.autograd.grad(cost, free), strict=True):
        assert float((gradient * part).detach().abs().max()) < 1e-3 * float(start)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_round_lowers_the_cost_and_codes_and_signs_stay(seed: int) -> None:
    weight, gram, constraint = fitted(seed)
    plain = constraint.encode(weight, gram.diagonal())
    costs = [gram.quadratic(constraint.decode(plain) - weight)]
    for rounds in (1, 2, 4, 8):
        found = solve(weight, gram, constraint, RefitSalient(rounds=rounds))
        costs.append(found.predicted_loss_increase)
        assert torch.equal(found.encoded.rest.positive, plain.rest.positive)
        assert torch.equal(found.encoded.grid.codes, plain.grid.codes)
    assert costs == sorted(costs, reverse=True)
    assert costs[1] < 0.95 * costs[0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="share of salient columns is 1"):
        SalientColumns(1.0)
    with pytest.raises(OptionError, match="asymmetric"):
        SalientColumns(0.2, Grid(4, -1, symmetric=False))
    with pytest.raises(OptionError, match="20% of 2 columns rounds to none or all"):
        solve(torch.ones(4, 2), Identity(), SalientColumns(), Nearest())
    with pytest.raises(UnsupportedProduct, match="needs a Gram"):
        RefitSalient().init(Identity())
    gram = Gram.from_inputs(torch.eye(4))
    with pytest.raises(UnsupportedProduct, match="solves SalientColumns, not Grid"):
        solve(torch.ones(4, 4), gram, Grid(), RefitSalient())


# Trained


def data() -> list[tuple[Tensor, Tensor]]:
    inputs = normal(1, 64, 16)
    return list(zip(inputs.split(16), inputs[:, :4].argmax(1).split(16), strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).double()


def test_a_step_of_one_bit_follows_its_formula() -> None:
    """With G the gradient at the layer's weight: w ← w - r G ⊙ abᵀ, a ← a - r (G ⊙ S) b, b ← b - r (G ⊙ S)ᵀ a."""
    model, batches, rate = network(), data()[:1], 0.1
    weight = model[0].weight.detach().clone()
    signs = torch.where(weight >= 0, 1.0, -1.0).double()
    a, b = rank_one(weight.abs(), torch.ones_like(weight))
    twin = network()
    with torch.no_grad():
        twin[0].weight.copy_(signs * torch.outer(a, b))
    nn.functional.cross_entropy(twin(batches[0][0]), batches[0][1]).backward()
    gradient = twin[0].weight.grad
    assert gradient is not None
    training = Training(
        steps=1, optimizer=lambda named: torch.optim.SGD(named, lr=rate), rate=lambda step, steps: 1.0, clip=None
    )
    found = finetune(model, batches, training, loss_function=CrossEntropy(), held={"0.weight": OneBit()}).report.free[
        "0.weight"
    ]
    along = gradient * signs
    wanted = (weight - rate * gradient * torch.outer(a, b), a - rate * along @ b, b - rate * a @ along)
    torch.testing.assert_close(found, wanted)
    now = torch.where(found[0] >= 0, 1.0, -1.0).double() * torch.outer(found[1], found[2])
    torch.testing.assert_close(model[0].weight.detach(), now)


@pytest.mark.parametrize("signs", ["held", "trained"])
def test_training_wins_back_what_one_bit_lost(signs: str) -> None:
    dense = network()
    finetune(
        dense,
        data(),
        Training(steps=150, optimizer=lambda named: torch.optim.Adam(named, 0.01)),
        loss_function=CrossEntropy(),
    )
    model = copy.deepcopy(dense)
    held = HeldSigns(model[0].weight.detach() >= 0) if signs == "held" else OneBit()
    training = Training(steps=100, optimizer=lambda named: torch.optim.Adam(named, 0.01), teacher=dense)
    found = finetune(model, data(), training, loss_function=CrossEntropy(), held={"0.weight": held}).report
    assert sum(found.losses[-4:]) < 0.5 * sum(found.losses[:4])
    weight = model[0].weight.detach()
    assert int(torch.linalg.matrix_rank(weight.abs())) == 1
    if signs == "held":
        assert torch.equal(weight >= 0, dense[0].weight.detach() >= 0)
    refitted = SignRankOne(dtype=DOUBLE).nearest(weight)  # so it is stored as it is
    torch.testing.assert_close(refitted, weight, rtol=1e-5, atol=1e-8)
