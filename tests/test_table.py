"""Tables of values: what they hold, that rounding is nearest, and that error feedback takes them as it takes grids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hesse.constraints import Grid, Table
from hesse.constraints.table import TABLES, floats
from hesse.curvature import Gram
from hesse.errors import OptionError
from hesse.solvers import ErrorFeedback, solve
from hesse.testing import normal, seeds

NF4 = [-1.0, -0.6961928, -0.5250730, -0.3949174, -0.2844413, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def test_tables_hold_what_their_formats_do() -> None:
    assert TABLES["fp4"] == (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert TABLES["nf4"] == pytest.approx(NF4, abs=1e-6)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert set(TABLES["fp8"]) == set(every[every.isfinite()].tolist())
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).float()
    assert {v for v in floats(5, 2) if abs(v) <= 57344} == set(every[every.isfinite()].tolist())
    assert max(TABLES["fp6"]) == 7.5
    assert [Table(name).code_bits for name in ("fp4", "fp6", "fp8", "nf4")] == [4, 6, 8, 4]


@pytest.mark.parametrize("name", TABLES)
@given(seed=seeds, group_size=st.sampled_from([-1, 5, 8]))
def test_each_weight_goes_to_the_nearest_value(name: str, seed: int, group_size: int) -> None:
    weight, table = normal(seed, 4, 20), Table(name, group_size, dtype=torch.float64)
    code = table.encode(weight)
    scale = table.expand(code.scales.scale, 20)
    values = torch.tensor(TABLES[name], dtype=torch.float64)
    found = table.decode(code)
    nearest = (weight[..., None] / scale[..., None] - values).abs().amin(-1) * scale
    torch.testing.assert_close((found - weight).abs(), nearest, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(table.nearest(found), found)
    assert torch.equal(table.nearest(torch.zeros(2, 20)), torch.zeros(2, 20))


def test_values_are_stored_in_the_dtype() -> None:
    found = Table("nf4", 8, dtype=torch.bfloat16).nearest(normal(0, 4, 16).float())
    assert torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("order", ["given", "descending"])
def test_error_feedback_makes_errors_good(order: str) -> None:
    plain = fed = 0.0
    for seed in range(5):
        weight, inputs = normal(seed, 8, 24), normal(seed + 50, 96, 24) + normal(seed + 60, 96, 1)
        gram = Gram.from_inputs(inputs).damped(0.01)
        table = Table("fp4", 8)
        found = solve(weight, gram, table, ErrorFeedback("descending" if order == "descending" else "given"))
        nearest = table.nearest(weight)
        for row, base, result in zip(weight, nearest, found.weight, strict=True):
            if order == "given":  # where scales are fitted on the way, so that the plain member has others
                break
            assert gram.quadratic(result - row) <= gram.quadratic(base - row) * (1 + 1e-6)
        plain, fed = plain + gram.quadratic(nearest - weight), fed + found.predicted_loss_increase
    assert fed < 0.9 * plain


def test_floats_beat_integers_on_tails_and_not_on_flat_weights() -> None:
    """The claim for such formats: finer near zero, coarser far out."""

    def error(weight: torch.Tensor, constraint: Grid | Table) -> float:
        return float((constraint.nearest(weight) - weight).norm())

    tails = normal(1, 64, 128) * normal(2, 64, 128).abs()
    flat = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)).double() - 0.5
    assert error(tails, Table("fp4", 128)) < error(tails, Grid(4, 128))
    assert error(flat, Table("fp4", 128)) > error(flat, Grid(4, 128))


def test_refusals() -> None:
    with pytest.raises(OptionError, match="there is no table 'fp5'; there are fp4, fp6, fp8, nf2, nf3, nf4"):
        Table("fp5")
    with pytest.raises(OptionError, match="group size is 0"):
        Table("fp4", 0)
