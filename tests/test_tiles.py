"""A common slope against brute force, and the curves of tiles against dense matrices in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import digits
from hesse.constraints import Sparse
from hesse.curvature import CrossEntropy, Fisher, Objective
from hesse.errors import OptionError
from hesse.planning import Candidate, ChoiceGroup, Problem, cheapest_within
from hesse.planning.block_sparsity import GradientKind, TileCosts, _tile_costs, _tiled, plan_tiles
from hesse.planning.slope import by_common_slope, lower_hull
from hesse.testing import normal

WEIGHTS = ("0.weight", "2.weight")


def problem(seed: int, groups: int = 4, candidates: int = 5) -> Problem:
    found = normal(seed, groups, candidates, 2).exp()
    return Problem(
        tuple(
            ChoiceGroup(
                f"{g}", tuple(Candidate(f"{c}", 1 + int(20 * s), float(loss)) for c, (s, loss) in enumerate(own))
            )
            for g, own in enumerate(found.tolist())
        )
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_a_common_slope_is_the_best_of_its_own_size(seed: int, share: float) -> None:
    made = problem(seed)
    size = int(made.smallest + share * (made.largest - made.smallest))
    found = by_common_slope(made, size)
    assert made.size(found) <= size
    every = itertools.product(*(range(len(group.candidates)) for group in made.groups))
    best = min(made.loss(choice) for choice in every if made.size(choice) <= made.size(found))
    assert made.loss(found) == pytest.approx(best)
    assert made.loss(cheapest_within(made, size)) <= made.loss(found) * (1 + 1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), price=st.floats(-3, 3))
def test_a_hull_holds_what_is_best_at_any_price(seed: int, price: float) -> None:
    (group,) = problem(seed, 1, 12).groups
    hull = lower_hull(group)
    best = min(group.candidates, key=lambda c: c.loss + 10**price * c.size)
    on_hull = min((group.candidates[place] for place in hull), key=lambda c: c.loss + 10**price * c.size)
    assert on_hull.loss + 10**price * on_hull.size == pytest.approx(best.loss + 10**price * best.size)
    slopes = [
        (group.candidates[a].loss - group.candidates[b].loss) / (group.candidates[b].size - group.candidates[a].size)
        for a, b in itertools.pairwise(hull)
    ]
    assert all(before > after > 0 for before, after in itertools.pairwise([*slopes, 0.0][: len(slopes)]))


def test_too_small_a_size_is_refused() -> None:
    made = problem(0)
    with pytest.raises(OptionError, match=f"{made.smallest:,}"):
        by_common_slope(made, made.smallest - 1)


def objective(trained: bool = False) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 6)).double()
    data = [(normal(1, 7, 4), torch.arange(7) % 6), (normal(2, 5, 4), torch.arange(5))]
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for inputs, targets in 30 * data if trained else []:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return Objective.of(model, CrossEntropy(), data, WEIGHTS)


def in_tiles(of: Objective, name: str, kept: Tensor, tile: tuple[int, int]) -> Tensor:
    """What removing tiles changes of all parameters, as a flat vector."""
    whole = kept.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    pieces = [-p.detach() * ~whole if other == name else torch.zeros_like(p) for other, p in of.named.items()]
    return torch.cat([piece.flatten() for piece in pieces])


@pytest.mark.parametrize("tile", [(1, 4), (2, 2)])
@pytest.mark.parametrize("gradients", ["mean", "sampled", "empirical"])
def test_a_curve_is_what_the_dense_matrix_says(gradients: GradientKind, tile: tuple[int, int]) -> None:
    of = objective()
    slope = of.gradient() if gradients == "mean" else torch.zeros(of.size).double()
    if gradients == "mean":
        dense = slope[:, None] * slope
    else:
        dense = Fisher(objective=of, kind=gradients, per="sample", seed=3).matrix()
    dense = dense + 0.5 * dense.diagonal().mean() * torch.eye(len(dense)).double()
    for name, costs in _tile_costs(of, tile, gradients, 0.5, 3).items():
        assert isinstance(costs, TileCosts)
        order, curve = costs.order(), costs.curve()
        alone = []
        for k in range(len(order) + 1):
            kept = torch.ones(len(order), dtype=torch.bool)
            kept[order[:k]] = False
            change = in_tiles(of, name, kept.view(costs.squares.shape), tile)
            assert float(curve[k]) == pytest.approx(float(slope @ change + 0.5 * change @ dense @ change), abs=1e-12)
        for own in order.tolist():
            only = torch.ones(len(order), dtype=torch.bool)
            only[own] = False
            change = in_tiles(of, name, only.view(costs.squares.shape), tile)
            alone.append(float(slope @ change + 0.5 * change @ dense @ change))
        assert alone == sorted(alone)


@pytest.mark.parametrize("kept", [0.3, 0.6, 1.0])
def test_whole_tiles_go_and_the_budget_is_kept_to(kept: float) -> None:
    of = objective(trained=True)
    plan = plan_tiles(of, kept, tile=(2, 2), levels=64)
    plan.apply(of)
    whole = sum(mask.numel() for mask in plan.masks.values())
    left = sum(int(mask.sum()) for mask in plan.masks.values())
    assert left / whole == pytest.approx(plan.kept)
    assert kept - 0.3 < plan.kept <= kept
    for name, mask in plan.masks.items():
        tiles = mask.view(mask.shape[0] // 2, 2, -1, 2).sum((1, 3))
        assert set(tiles.unique().tolist()) <= {0, 4}
        assert bool(tiles.any())
        assert plan.shares[name] == pytest.approx(1 - int(mask.sum()) / mask.numel())
        assert torch.equal(of.named[name] == 0, ~mask)


def test_what_is_dear_is_pruned_more() -> None:
    even = plan_tiles(objective(trained=True), 0.5, tile=(1, 2), levels=64)
    dear = plan_tiles(objective(trained=True), 0.5, tile=(1, 2), levels=64, cost={"0.weight": 20.0, "2.weight": 1.0})
    assert dear.shares["0.weight"] > even.shares["0.weight"]
    assert dear.kept <= 0.5


def test_what_does_not_divide_is_refused_before_any_work() -> None:
    of = objective()
    with pytest.raises(OptionError, match=r"2.weight \(6, 8\) does not divide into tiles of 4 × 4"):
        plan_tiles(of, 0.5)
    with pytest.raises(OptionError, match="the share to keep is 0"):
        plan_tiles(of, 0.0, tile=(1, 1))
    biased = Objective.of(of.model, of.loss, of.data, ("0.bias",))
    with pytest.raises(OptionError, match=r"0.bias \(8,\) does not divide"):
        plan_tiles(biased, 0.5)
    with pytest.raises(OptionError, match="nothing fits into"):
        plan_tiles(of, 0.01, tile=(2, 2))


def test_tiles_of_a_vision_transformer_that_are_called_unimportant_are() -> None:
    """Removed and measured, beside as many tiles by lot, and by their norms as many in each matrix."""
    model = digits.trained("vit")
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")]
    of = Objective.of(model, CrossEntropy(), digits.batches("train", 128), names)
    plan = plan_tiles(of, 0.6)
    lots, norms = {}, {}
    for name, parameter in of.named.items():
        tiles = _tiled(parameter.detach().square(), (4, 4))
        norms[name] = spread(Sparse(0.4).mask(tiles))
        lots[name] = spread(Sparse(plan.shares[name]).mask(normal(len(lots), *tiles.shape).exp()))
    ours = masked_loss(plan.masks)
    assert ours < masked_loss(lots)
    assert ours < 0.7 * masked_loss(norms)


def spread(tiles: Tensor) -> Tensor:
    """A mask of 4 × 4 tiles as one of weights."""
    return tiles.repeat_interleave(4, 0).repeat_interleave(4, 1)


def masked_loss(masks: dict[str, Tensor]) -> float:
    """On the test images."""
    model = digits.trained("vit")
    images, labels = digits.digits()[1]
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))
