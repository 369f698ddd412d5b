"""Every constraint: its members, its stored form and its nearest member, by law and by hand."""

from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.constraints import Constraint, Grid, GridCode, LowRank, Sparse, SparseGrid
from hesse.errors import OptionError, UnsupportedProduct

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
laws = settings(max_examples=100, deadline=None)
seeds = st.integers(0, 2**31 - 1)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 40))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def grids(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> Grid:
    """Any Grid; group sizes from 1 to wider than any drawn weight, so most last groups are ragged."""
    return Grid(
        bits=draw(st.integers(2, 8)),
        group_size=draw(st.sampled_from([-1, 1, 3, 8, 16, 64])),
        symmetric=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
    )


@st.composite
def weights(draw: st.DrawFn, least_exponent: int = -9) -> Tensor:
    """Weights (out, in) of any size that float16 can hold, some of them exactly zero, and one of their columns too."""
    rows, columns = draw(shapes)
    weight = normal(draw(seeds), rows, columns) * 10.0 ** draw(st.integers(least_exponent, 3))
    if draw(st.booleans()):
        weight[:, draw(st.integers(0, columns - 1)) :] = 0
    if draw(st.booleans()):
        row = draw(st.integers(0, rows - 1))
        weight[row] = weight[row].abs() * draw(st.sampled_from([-1, 1]))  # a row of one sign
    return weight


def is_stored_in(tensor: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


# Grid


def assert_codes_come_back(grid: Grid, encoded: GridCode) -> None:
    """decode(round(decode(code), scales)) == code."""
    again = grid.round(grid.decode(encoded), encoded.scales)
    if grid.bits == 8 and not grid.symmetric and grid.dtype == torch.bfloat16:
        # More than 128 steps from zero the steps are finer than bfloat16, so neighbours can be the same number.
        assert int((again.codes.int() - encoded.codes.int()).abs().max()) <= 1
        return
    assert torch.equal(again.codes, encoded.codes)
    assert torch.equal(grid.decode(again), grid.decode(encoded))


@settings(max_examples=300, deadline=None)
@given(grid=grids(), weight=weights())
def test_grid_members_keep_their_codes(grid: Grid, weight: Tensor) -> None:
    assert_codes_come_back(grid, grid.encode(weight))


@settings(max_examples=300, deadline=None)
@given(grid=grids(), weight=weights())
def test_every_code_of_a_grid_comes_back(grid: Grid, weight: Tensor) -> None:
    scales = grid.fit(weight)
    for code in range(grid.lowest, grid.highest + 1, max(1, 2**grid.bits // 32)):
        assert_codes_come_back(grid, GridCode(torch.full(weight.shape, code, dtype=torch.int8), scales))


@laws
@given(grid=grids(), weight=weights())
def test_grid_stores_what_a_loader_reads(grid: Grid, weight: Tensor) -> None:
    encoded = grid.encode(weight)
    assert encoded.codes.dtype == torch.int8
    assert int(encoded.codes.min()) >= -(2 ** (grid.bits - 1))
    assert int(encoded.codes.max()) <= 2 ** (grid.bits - 1) - 1
    assert encoded.scales.scale.shape == (len(weight), grid.groups(weight.shape[1]))
    assert bool((encoded.scales.scale > 0).all())
    assert is_stored_in(encoded.scales.scale, grid.dtype)
    assert is_stored_in(grid.decode(encoded), grid.dtype)
    zero_point = encoded.scales.zero_point
    assert (zero_point is None) == grid.symmetric
    if zero_point is not None:
        assert torch.equal(zero_point, zero_point.round().clamp(grid.lowest, grid.highest))


@laws
@given(grid=grids(), weight=weights())
def test_grid_holds_zero(grid: Grid, weight: Tensor) -> None:
    scales = grid.encode(weight).scales
    assert not grid.decode(grid.round(torch.zeros_like(weight), scales)).any()


@laws
@given(grid=grids(), weight=weights())
def test_grid_decodes_as_the_definition_says(grid: Grid, weight: Tensor) -> None:
    encoded = grid.encode(weight)
    decoded, width = grid.decode(encoded), grid.group_width(weight.shape[1])
    for column in range(weight.shape[1]):
        group = column // width
        codes = encoded.codes[:, column].float()
        if encoded.scales.zero_point is not None:
            codes = codes - encoded.scales.zero_point[:, group]
        expected = (codes * encoded.scales.scale[:, group]).to(grid.dtype).float()
        assert torch.equal(decoded[:, column], expected)


@laws
@given(grid=grids(dtypes=(torch.float32,)), weight=weights(least_exponent=-3))
def test_grid_codes_are_the_nearest_of_all_codes(grid: Grid, weight: Tensor) -> None:
    encoded = grid.encode(weight)
    error = (grid.decode(encoded) - weight).abs()
    scale = grid.expand(encoded.scales.scale, weight.shape[1])
    for code in range(grid.lowest, grid.highest + 1):
        other = grid.decode(GridCode(torch.full_like(encoded.codes, code), encoded.scales))
        assert bool((error <= (other - weight).abs() + 1e-4 * scale).all())


@laws
@given(grid=grids(dtypes=(torch.float32,)), weight=weights(least_exponent=-3))
def test_grid_reaches_every_weight(grid: Grid, weight: Tensor) -> None:
    # Half a step by rounding; asymmetric zero points are whole numbers, which cuts another half off one end.
    encoded = grid.encode(weight)
    steps = (grid.decode(encoded) - weight).abs() / grid.expand(encoded.scales.scale, weight.shape[1])
    assert float(steps.max()) <= (0.5 if grid.symmetric else 1) + 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_scales_by_hand(bits: int, dtype: torch.dtype) -> None:
    # Groups of 3 columns, the last with one column: ranges [-2, 1], [0.5, 3] widened to 0, and [-0.25, 0].
    weight = torch.tensor([[-2.0, 0.5, 1.0, 0.5, 3.0, 2.0, -0.25]])
    levels = 2**bits - 1
    symmetric = Grid(bits, 3, dtype=dtype).encode(weight).scales
    expected = torch.tensor([[2.0, 3.0, 0.25]]) / (levels / 2)
    torch.testing.assert_close(symmetric.scale, expected.to(dtype).float())
    asymmetric = Grid(bits, 3, symmetric=False, dtype=dtype).encode(weight).scales
    expected = torch.tensor([[3.0, 3.0, 0.25]]) / levels
    torch.testing.assert_close(asymmetric.scale, expected.to(dtype).float())
    assert asymmetric.zero_point is not None
    lowest = -(2 ** (bits - 1))
    # The stored scale is a rounded one, so a zero point may be one code from that of the exact scale.
    expected = lowest + levels * torch.tensor([[2 / 3, 0.0, 1.0]])
    assert bool(((asymmetric.zero_point - expected).abs() <= 1).all())


def test_grid_of_a_row_by_hand() -> None:
    weight = torch.tensor([[-1.5, -0.6, 0.4, 1.5]])
    encoded = Grid(bits=2, group_size=-1).encode(weight)
    assert encoded.scales.scale.tolist() == [[1.0]]  # 1.5 / (3 / 2)
    assert encoded.codes.tolist() == [[-2, -1, 0, 1]]  # codes are -2 .. 1; 1.5 is clamped
    encoded = Grid(bits=2, group_size=-1, symmetric=False).encode(weight)
    assert encoded.scales.scale.tolist() == [[1.0]]  # 3 / 3
    assert encoded.scales.zero_point is not None
    assert encoded.scales.zero_point.tolist() == [[0.0]]  # -2 + 1.5 = -0.5, to the even neighbour


def test_group_widths() -> None:
    assert [Grid(group_size=128).groups(columns) for columns in (64, 128, 129, 300)] == [1, 1, 2, 3]
    assert Grid(group_size=128).group_width(64) == 64
    assert Grid(group_size=-1).groups(4096) == 1


def test_nearest_codes_are_the_same_in_every_metric() -> None:
    weight = normal(0, 6, 16)
    for metric in (torch.tensor(2.0), normal(1, 16).square(), normal(2, 6, 16).square()):
        assert torch.equal(Grid(3, 8).nearest(weight, metric), Grid(3, 8).nearest(weight))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-10, -1e-10, 1e-38, 1e-44])
def test_groups_of_zeros_and_of_what_underflows_are_zeros(value: float, dtype: torch.dtype, symmetric: bool) -> None:
    weight = torch.ones(2, 8)
    weight[:, :4] = value
    grid = Grid(4, 4, symmetric, dtype=dtype)
    member = grid.nearest(weight)
    assert bool(torch.isfinite(member).all())
    assert bool(((member[:, :4] - value).abs() <= abs(value)).all())
    if dtype == torch.float16:
        assert not member[:, :4].any()
        assert bool((grid.encode(weight).scales.scale[:, 0] == 1).all())
    assert bool(((member[:, 4:] - 1).abs() < 0.1).all())


def test_grid_of_float64_stays_in_float64() -> None:
    weight = normal(0, 2, 8).double()
    assert Grid(dtype=torch.float16).nearest(weight).dtype == torch.float64


# Sparse

tied_scores = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 6).flatmap(
        lambda groups: st.lists(
            st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0]), min_size=4 * groups, max_size=4 * groups),
            min_size=rows,
            max_size=rows,
        )
    )
)
shares = st.floats(0, 0.999)


@laws
@given(scores=tied_scores, amount=shares, scope=st.sampled_from(["layer", "row"]))
@example(scores=[[0.0] * 8] * 3, amount=0.5, scope="layer")
def test_sparse_drops_exactly_the_asked_number(scores: list[list[float]], amount: float, scope: str) -> None:
    table = torch.tensor(scores)
    sparse = Sparse(amount, scope="row" if scope == "row" else "layer")
    mask = sparse.mask(table)
    if scope == "row":
        assert bool(((~mask).sum(1) == round(amount * table.shape[1])).all())
        pairs = zip(table, mask, strict=True)
    else:
        assert int((~mask).sum()) == round(amount * table.numel())
        pairs = zip([table], [mask], strict=True)
    for part, kept in pairs:
        if kept.any() and not kept.all():
            assert part[kept].min() >= part[~kept].max()


@laws
@given(scores=tied_scores, data=st.data())
def test_sparse_drops_another_number_of_each_row(scores: list[list[float]], data: st.DataObject) -> None:
    table = torch.tensor(scores)
    numbers = torch.tensor([data.draw(st.integers(0, table.shape[1])) for _ in table])
    assert torch.equal((~Sparse(0.5, scope="row").mask(table, numbers)).sum(1), numbers)
    assert int((~Sparse(0.5).mask(table, numbers[:1])).sum()) == int(numbers[0])


@laws
@given(scores=tied_scores, kept=st.integers(1, 3))
def test_n_of_m_keeps_the_n_highest_of_every_m(scores: list[list[float]], kept: int) -> None:
    table = torch.tensor(scores)
    mask = Sparse(kept, 4).mask(table)
    groups, chosen = table.view(-1, 4), mask.view(-1, 4)
    assert bool((chosen.sum(1) == kept).all())
    assert torch.equal((groups * chosen).sum(1), groups.topk(kept, dim=1).values.sum(1))
    member = Sparse(kept, 4).nearest(table)
    assert bool((member.view(-1, 4).count_nonzero(dim=1) <= kept).all())


@laws
@given(weight=weights(), amount=shares, dtype=st.sampled_from(DTYPES))
def test_sparse_stores_kept_weights_and_zeros(weight: Tensor, amount: float, dtype: torch.dtype) -> None:
    sparse = Sparse(amount, dtype=dtype)
    encoded = sparse.encode(weight)
    member = sparse.decode(encoded)
    assert torch.equal(member, torch.where(encoded.mask, weight.to(dtype).float(), 0))
    assert is_stored_in(member, dtype)
    assert torch.equal(sparse.decode(sparse.encode_masked(member, encoded.mask)), member)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, drop=st.integers(0, 5), weighted=st.booleans())
def test_sparse_nearest_beats_every_other_mask(seed: int, drop: int, weighted: bool) -> None:
    weight = normal(seed, 2, 3)
    metric = normal(seed + 1, 2, 3).square() if weighted else None
    losses = (weight.square() * (1 if metric is None else metric)).flatten()
    member = Sparse(drop / 6).nearest(weight, metric)
    found = float(losses[member.flatten() == 0].sum())
    subsets = list(combinations(range(6), drop))
    assert len(subsets) == comb(6, drop)
    assert found <= min(float(losses[list(subset)].sum()) for subset in subsets) * (1 + 1e-6)


def test_sparse_metric_by_column_reaches_every_row() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    member = Sparse(2, 4).nearest(weight, torch.tensor([100.0, 0.0, 0.0, 1.0]))
    assert member.tolist() == [[1.0, 0.0, 0.0, 4.0], [4.0, 0.0, 0.0, 1.0]]


# Sparse & Grid


@laws
@given(
    weight=weights(),
    grid=grids(),
    sparse=st.sampled_from([Sparse(0.5), Sparse(0.7, scope="row"), Sparse(0.0), Sparse(2, 4)]),
)
def test_sparse_grid_has_zeros_where_pruned(weight: Tensor, grid: Grid, sparse: Sparse) -> None:
    weight = weight.repeat(1, 4)  # so that 2:4 fits
    joint = sparse & grid
    encoded = joint.encode(weight)
    member, mask = joint.decode(encoded), sparse.encode(weight).mask
    assert not member[~mask].any()
    assert_codes_come_back(grid, encoded)
    assert is_stored_in(member, grid.dtype)


def test_sparse_grid_is_the_grid_of_the_pruned_weight() -> None:
    weight, metric = normal(0, 4, 16), normal(1, 16).square()
    sparse, grid = Sparse(2, 4), Grid(3, 8)
    expected = grid.nearest(sparse.nearest(weight, metric), metric)
    assert torch.equal((sparse & grid).nearest(weight, metric), expected)


def test_intersections_are_written_with_an_ampersand() -> None:
    joint = Sparse(2, 4) & Grid(4, 128, dtype=torch.float16)
    assert joint == SparseGrid(Sparse(2, 4), Grid(4, 128, dtype=torch.float16), dtype=torch.float16)
    with pytest.raises(OptionError, match="not with LowRank"):
        Sparse(0.5) & LowRank(4)  # type: ignore[operator]


# LowRank


@settings(max_examples=50, deadline=None)
@given(seed=seeds, rows=st.integers(1, 8), columns=st.integers(1, 8), data=st.data())
def test_low_rank_nearest_is_that_of_eckart_and_young(seed: int, rows: int, columns: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = normal(seed, rows, columns).double()
    member = LowRank(rank).stored_as(torch.float64).nearest(weight)
    assert int(torch.linalg.matrix_rank(member)) <= rank
    error = (member - weight).square().sum()
    tail = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close(error, tail)
    left, right = normal(seed + 1, rows, rank).double(), normal(seed + 2, rank, columns).double()
    # The best member that shares the random left factor, found by least squares, is not nearer.
    competitor = left @ torch.linalg.lstsq(left, weight).solution
    assert error <= (competitor - weight).square().sum() + 1e-9
    # Nor is any small change of the member's own factors.
    encoded = LowRank(rank).stored_as(torch.float64).encode(weight)
    nudged = (encoded.left + 1e-3 * left) @ (encoded.right + 1e-3 * right)
    assert error <= (nudged - weight).square().sum() + 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_factors_are_stored_in_the_dtype(dtype: torch.dtype) -> None:
    constraint = LowRank(3, dtype=dtype)
    encoded = constraint.encode(normal(0, 8, 12))
    assert encoded.left.shape == (8, 3)
    assert encoded.right.shape == (3, 12)
    assert is_stored_in(encoded.left, dtype)
    assert is_stored_in(encoded.right, dtype)
    assert torch.equal(constraint.decode(encoded), encoded.left @ encoded.right)
    # The factors share the singular values evenly, so that neither needs a wider range than the other.
    torch.testing.assert_close(encoded.left.norm(dim=0), encoded.right.norm(dim=1), rtol=1e-2, atol=0)


def test_low_rank_has_no_weighted_nearest_member() -> None:
    with pytest.raises(UnsupportedProduct, match="WhitenedSVD"):
        LowRank(2).encode(normal(0, 4, 4), torch.ones(4))


# All constraints

SPARSE: list[Constraint] = [Sparse(0.5), Sparse(0.5, scope="row"), Sparse(2, 4), Sparse(2, 4) & Grid()]
EVERY_CONSTRAINT = pytest.mark.parametrize("constraint", [Grid(), Grid(group_size=-1), *SPARSE, LowRank(4)], ids=str)


@pytest.mark.parametrize(
    ("constraint", "shape", "bits"),
    [
        (Grid(4, 128), (64, 256), 4 + 32 / 128),  # scales are float32 unless said otherwise
        (Grid(4, 128, dtype=torch.float16), (64, 256), 4 + 16 / 128),
        (Grid(4, 128, symmetric=False, dtype=torch.bfloat16), (64, 256), 4 + (16 + 4) / 128),
        (Grid(3, -1, dtype=torch.float16), (64, 256), 3 + 16 / 256),
        (Grid(8, 128, dtype=torch.float16), (64, 300), 8 + 3 * 16 / 300),  # 128 + 128 + 44 columns
        (Grid(4, 128, dtype=torch.float16), (64, 32), 4 + 16 / 32),  # narrower than a group
        (Sparse(0.5, dtype=torch.float16), (64, 256), 0.5 * 16 + 1),
        (Sparse(0.75, scope="row", dtype=torch.float16), (64, 256), 0.25 * 16 + 1),
        (Sparse(2, 4, dtype=torch.bfloat16), (64, 256), 0.5 * 16 + 1),
        (Sparse(1, 4), (64, 256), 0.25 * 32 + 1),
        (Sparse(2, 4) & Grid(4, 128, dtype=torch.float16), (64, 256), 4 + 16 / 128),
        (LowRank(8, dtype=torch.float16), (64, 256), 16 * 8 * (64 + 256) / (64 * 256)),
    ],
    ids=str,
)
def test_bits_per_weight_by_hand(constraint: Constraint, shape: tuple[int, int], bits: float) -> None:
    assert constraint.bits_per_weight(torch.Size(shape)) == pytest.approx(bits, abs=1e-12)


@EVERY_CONSTRAINT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_as_changes_the_dtype_and_nothing_else(constraint: Constraint, dtype: torch.dtype) -> None:
    stored = constraint.stored_as(dtype)
    assert stored.dtype == dtype
    assert stored.stored_as(torch.float32) == constraint
    if isinstance(stored, SparseGrid):
        assert stored.sparse.dtype == stored.grid.dtype == dtype


@EVERY_CONSTRAINT
def test_nearest_keeps_shape_and_precision(constraint: Constraint) -> None:
    for dtype in (torch.float64, torch.float32):
        weight = normal(0, 8, 12).to(dtype)
        assert constraint.nearest(weight).dtype == weight.dtype
        assert constraint.nearest(weight).shape == weight.shape


@EVERY_CONSTRAINT
def test_rows_are_independent_where_they_say_so(constraint: Constraint) -> None:
    weight = normal(1, 6, 12)
    weight[3] *= 100
    whole = constraint.nearest(weight)
    apart = torch.cat([constraint.nearest(row[None]) for row in weight]) if constraint.rows_are_independent else None
    assert apart is None or torch.equal(whole, apart)
    assert constraint.rows_are_independent == (constraint not in (Sparse(0.5), LowRank(4)))


# Refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Grid(bits=1), "2 to 8"),
        (lambda: Grid(bits=9), "2 to 8"),
        (lambda: Grid(group_size=0), "group size is 0"),
        (lambda: Grid(group_size=-2), "group size is -2"),
        (lambda: Sparse(1.0), "below 1"),
        (lambda: Sparse(-0.1), "at least 0"),
        (lambda: Sparse(float("nan")), "at least 0"),
        (lambda: Sparse(4, 4), "1 <= N < M"),
        (lambda: Sparse(0, 4), "1 <= N < M"),
        (lambda: Sparse(1.5, 4), "1 <= N < M"),
        (lambda: LowRank(0), "at least 1"),
    ],
)
def test_meaningless_options_are_refused(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(OptionError, match=message):
        build()


@pytest.mark.parametrize(
    ("constraint", "shape", "message"),
    [
        (Sparse(2, 4), (8, 10), "divisible by 4"),
        (Sparse(2, 4) & Grid(), (8, 10), "divisible by 4"),
        (LowRank(5), (4, 16), "use at most 3"),
        (LowRank(5), (16, 4), "use at most 3"),
    ],
)
def test_weights_that_do_not_fit_are_refused(constraint: Constraint, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        constraint.check(torch.Size(shape))


@EVERY_CONSTRAINT
def test_weights_that_fit_pass(constraint: Constraint) -> None:
    constraint.check(torch.Size((8, 12)))
