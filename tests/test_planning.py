"""Budgets shared out: against brute force, and the laws of a front of sizes and losses."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hesse.errors import OptionError
from hesse.planning import Candidate, Choice, ChoiceGroup, Problem, cheapest_within, size_loss_front, smallest_within
from hesse.planning.solve import GAP


def problem(seed: int, groups: int = 5, candidates: int = 4) -> Problem:
    """Random groups, each with a sensitivity of its own."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(groups):
        scale, weights = 10 ** random.uniform(-4, -1), int(random.integers(1, 5)) * 4096
        bits = np.sort(random.uniform(2, 8, candidates))
        losses = scale * 4**-bits * random.uniform(0.7, 1.4, candidates)
        found = zip(bits.tolist(), losses.tolist(), strict=True)
        members = tuple(Candidate(f"{b:.2f} bits", int(weights * b / 8), loss) for b, loss in found)
        made.append(ChoiceGroup(f"layer {number}", members))
    return Problem(tuple(made))


def choices(of: Problem) -> list[Choice]:
    return list(itertools.product(*(range(len(group.candidates)) for group in of.groups)))


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_choice_is_that_of_brute_force(seed: int) -> None:
    small = problem(seed)
    for share in (0.0, 0.3, 0.7, 1.0):
        room = int(small.smallest + share * (small.largest - small.smallest))
        best = min(small.loss(choice) for choice in choices(small) if small.size(choice) <= room)
        found = cheapest_within(small, room)
        assert small.size(found) <= room
        assert best <= small.loss(found) <= best * (1 + GAP)


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_choice_is_that_of_brute_force(seed: int) -> None:
    small = problem(seed)
    losses = sorted(small.loss(choice) for choice in choices(small))
    for limit in (losses[0], losses[20], losses[len(losses) // 2], 2 * losses[-1]):
        best = min(small.size(choice) for choice in choices(small) if small.loss(choice) <= limit)
        found = smallest_within(small, limit)
        assert small.loss(found) <= limit
        assert best <= small.size(found) <= best * (1 + GAP)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), more=st.floats(0, 1))
def test_more_bytes_never_cost_more(seed: int, share: float, more: float) -> None:
    any_problem = problem(seed, groups=8)
    span = any_problem.largest - any_problem.smallest
    room = int(any_problem.smallest + share * span)
    less, wide = cheapest_within(any_problem, room), cheapest_within(any_problem, int(room + more * span))
    assert any_problem.size(less) <= room
    assert any_problem.loss(wide) <= any_problem.loss(less) * (1 + GAP)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_two_budgets_agree(seed: int) -> None:
    any_problem = problem(seed, groups=8)
    room = (any_problem.smallest + any_problem.largest) // 2
    loss = any_problem.loss(cheapest_within(any_problem, room))
    assert any_problem.size(smallest_within(any_problem, loss)) <= room * (1 + GAP)


def test_a_front_rises_in_size_and_falls_in_loss() -> None:
    large = problem(3, groups=28, candidates=10)
    front = size_loss_front(large, 12)
    assert len(front) == 12
    assert front[0].size == large.smallest
    assert front[-1].size == large.largest
    for before, after in itertools.pairwise(front):
        assert before.size < after.size
        assert before.loss > after.loss
    for point in front:
        assert (large.size(point.choice), large.loss(point.choice)) == (point.size, point.loss)


def test_losses_of_any_scale_are_told_apart() -> None:
    """HiGHS works to absolute tolerances; nats per token may be far below them."""
    small = problem(0)
    for scale in (1e-12, 1e6):
        scaled = Problem(
            tuple(
                ChoiceGroup(g.name, tuple(Candidate(c.label, c.size, c.loss * scale) for c in g.candidates))
                for g in small.groups
            )
        )
        room = (small.smallest + small.largest) // 2
        assert cheapest_within(scaled, room) == cheapest_within(small, room)


def test_what_costs_nothing_is_taken() -> None:
    free = ChoiceGroup("free", (Candidate("small", 10, 0.0), Candidate("left alone", 90, 0.0)))
    other = ChoiceGroup("other", (Candidate("small", 10, 1.0), Candidate("left alone", 90, 0.0)))
    both = Problem((free, other))
    assert both.loss(cheapest_within(both, 180)) == 0
    assert both.size(smallest_within(both, 1e-3)) == 100
    assert both.largest == 100


def test_budgets_that_cannot_be_met_say_what_can() -> None:
    small = problem(1)
    with pytest.raises(OptionError, match=f"{small.smallest:,}"):
        cheapest_within(small, small.smallest - 1)
    least = min(small.loss(choice) for choice in choices(small))
    with pytest.raises(OptionError, match=f"the least is {least:.3g}"):
        smallest_within(small, least / 2)


def test_problems_without_meaning_are_refused() -> None:
    with pytest.raises(OptionError, match="empty has no candidates"):
        Problem((ChoiceGroup("empty", ()),))
    for loss in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="one: a costs"):
            Problem((ChoiceGroup("one", (Candidate("a", 1, loss),)),))


def test_nothing_is_printed_by_the_solver(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS has lines for standard output in some problems, where `--json` must stand alone."""
    for seed in range(40):
        found = problem(seed, groups=12, candidates=8)
        cheapest_within(found, int(1.5 * found.smallest))
    print("after")
    assert capfd.readouterr().out == "after\n"
