"""Predictors of what a layer's change costs, and plans by them: dense Hessians in float64, and brute force."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hesse
import small_nets
from helpers import IDS
from hesse.curvature import Curvature, GaussNewton, Gram, Hessian, Kronecker, Objective
from hesse.errors import OptionError
from hesse.formats import open_networks
from hesse.methods import Options, find_method
from hesse.planning import Candidate, Choice, ChoiceGroup, Problem
from hesse.planning.bisection import smallest_accepted
from hesse.planning.costs import CostMeter
from hesse.planning.joint_layers import dependent_blocks, joint_problem, single_choice
from hesse.planning.menu import make_menu
from hesse.planning.pricing import Member, allocate, changes_of, grid_menu, menu_problem, use
from hesse.scores import SCORES
from hesse.scores.interactions import interactions
from hesse.scores.sensitivities import Sensitivity, find_sensitivity, predicted_costs
from hesse.testing import normal

FolderOf = Callable[[str], Path]


def objective(setting: str = "mlp", loss: str = "cross-entropy") -> Objective:
    """Of the matrices alone."""
    made = small_nets.make(setting, loss)
    matrices = tuple(name for name, parameter in made.named.items() if parameter.ndim > 1)
    return Objective.of(made.model, made.loss, made.data, matrices, made.forward)


def blocks(of: Objective) -> dict[str, Tensor]:
    """The dense Hessian of each parameter alone, by autograd on plain calls."""
    inputs, targets = small_nets.everything(of)
    found = {}
    for name, parameter in of.named.items():

        def loss(values: Tensor, name: str = name) -> Tensor:
            outputs = torch.func.functional_call(of.model, {name: values}, (inputs,))
            return torch.nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

        matrix = torch.autograd.functional.hessian(loss, parameter.detach())
        assert isinstance(matrix, Tensor)
        found[name] = matrix.reshape(parameter.numel(), -1)
    return found


def hessian(of: Objective) -> Curvature:
    return Hessian(objective=of)


def gauss_newton(of: Objective) -> Curvature:
    return GaussNewton(objective=of)


def changes(of: Objective, number: int = 2) -> dict[str, list[Tensor]]:
    return {
        name: [0.1 * (k + 1) * normal(7 * place + k, *parameter.shape) for k in range(number)]
        for place, (name, parameter) in enumerate(of.named.items())
    }


# What a layer's number is


def test_hawq_is_the_largest_eigenvalue_over_the_size() -> None:
    of = objective()
    made = changes(of)
    found = predicted_costs(of, made, "hawq", hessian)
    for name, matrix in blocks(of).items():
        largest = float(torch.linalg.eigvalsh(matrix)[-1])
        expected = [0.5 * largest / len(matrix) * float(change.square().sum()) for change in made[name]]
        assert found[name] == pytest.approx(expected, rel=1e-6)


def test_hawq_v2_is_the_trace_over_the_size() -> None:
    of = objective()
    made = changes(of)
    found = predicted_costs(of, made, "hawq-v2", hessian)
    for name, matrix in blocks(of).items():
        off = matrix - matrix.diagonal().diag()
        error = (2 * float(off.square().sum()) / 64) ** 0.5  # of Hutchinson's estimate from 64 random signs
        for cost, change in zip(found[name], made[name], strict=True):
            trace = cost / (0.5 * float(change.square().sum())) * len(matrix)
            assert trace == pytest.approx(float(matrix.trace()), abs=4 * error + 1e-9)


def test_a_trace_that_is_known_is_not_estimated() -> None:
    output, inputs = (normal(k, n, n) for k, n in ((0, 3), (1, 4)))
    curvature = Kronecker(output_factor=output @ output.T, input_factor=inputs @ inputs.T)
    dense = curvature.matrix()
    assert find_sensitivity("hawq-v2").coefficient([curvature]) == pytest.approx(float(dense.trace()) / 12)
    largest = float(torch.linalg.eigvalsh(dense)[-1])
    assert find_sensitivity("hawq").coefficient([curvature]) == pytest.approx(largest / 12)
    diagonal = Kronecker(output_factor=(output @ output.T).diagonal(), input_factor=inputs @ inputs.T)
    largest = float(torch.linalg.eigvalsh(diagonal.matrix())[-1])
    assert find_sensitivity("hawq").coefficient([diagonal]) == pytest.approx(largest / 12)


def test_the_trace_is_what_a_change_in_any_direction_costs() -> None:
    """½ tr(H)/n ‖d‖² is the mean of ½ dᵀHd over directions: nats, which λ_max is not."""
    rows = normal(3, 9, 6)
    curvature = Gram(second_moment=rows.T @ rows, tokens=9)
    directions = normal(4, 4000, 6)
    directions /= directions.norm(dim=1, keepdim=True)
    mean = sum(curvature.quadratic(each[None]) for each in directions) / len(directions)
    assert 0.5 * find_sensitivity("hawq-v2").coefficient([curvature]) == pytest.approx(mean, rel=0.05)
    assert [each.name for each in SCORES.values() if isinstance(each, Sensitivity) and each.nats] == ["hawq-v2"]


def test_q_bert_is_the_mean_and_the_spread_over_parts_of_the_data() -> None:
    of = objective()
    made = changes(of, 1)
    found = predicted_costs(of, made, "q-bert", hessian)
    batches = list(of.data)
    assert len(batches) == 3
    parts = [blocks(Objective.of(of.model, of.loss, [batch], of.names)) for batch in batches]
    for name, own in found.items():
        values = torch.stack([torch.linalg.eigvalsh(part[name])[-1] for part in parts])
        spread = float(values.mean().abs() + values.std(correction=0))
        assert own == pytest.approx([0.5 * spread * float(made[name][0].square().sum())], rel=1e-6)


# What changes do to one another


@pytest.mark.parametrize("setting", ["mlp", "conv", "attention"])
def test_interactions_are_those_of_the_dense_matrix(setting: str) -> None:
    of = objective(setting)
    made, curvature = changes(of), gauss_newton(of)
    vectors, dense = [], curvature.matrix()
    for name, own in made.items():
        vectors += [
            torch.cat([(change if other == name else torch.zeros_like(p)).flatten() for other, p in of.named.items()])
            for change in own
        ]
    together = torch.stack(vectors)
    found = interactions(curvature, of, made)
    torch.testing.assert_close(found, together @ dense @ together.T / 2)
    alone = predicted_costs(of, made, "second-order")
    torch.testing.assert_close(found.diagonal(), torch.tensor([c for own in alone.values() for c in own]).double())


def test_layers_parts_with_all_others_sum_to_the_whole() -> None:
    of = objective("attention")
    made = changes(of)
    found = predicted_costs(of, made, "inter-layer")
    costs = interactions(gauss_newton(of), of, made)
    for level in range(2):
        places = list(range(level, len(costs), 2))
        own = costs[places][:, places].sum(1).clamp(min=0)
        assert [costs_of[level] for costs_of in found.values()] == pytest.approx(own.tolist(), rel=1e-9, abs=1e-12)


def test_layers_that_feel_one_another_are_one_block() -> None:
    sizes = torch.tensor([1.0, 2.0, 3.0, 4.0])
    related = torch.eye(4).double()
    related[0, 1] = related[1, 0] = -0.5
    related[1, 3] = related[3, 1] = 0.4
    costs = related * sizes * sizes[:, None]
    assert dependent_blocks(costs, 0.3, 4) == [[0, 1], [2], [3]]
    related[1, 2] = related[2, 1] = 0.35
    costs = related * sizes * sizes[:, None]
    assert dependent_blocks(costs, 0.3, 4) == [[0, 1, 2, 3]]
    assert dependent_blocks(costs, 0.3, 2) == [[0, 1], [2], [3]]
    assert dependent_blocks(costs, 0.6, 4) == [[0], [1], [2], [3]]


# Plans


def menu_of(of: Objective) -> dict[str, list[Member]]:
    return grid_menu(of, (4, 3, 2))


def all_choices(problem: Problem) -> list[Choice]:
    return list(itertools.product(*(range(len(group.candidates)) for group in problem.groups)))


@pytest.mark.parametrize("setting", ["mlp", "linear", "attention"])
@pytest.mark.parametrize("sensitivity", ["hawq", "hawq-v2", "q-bert", "second-order", "inter-layer"])
def test_a_plan_is_the_best_of_all_assignments(setting: str, sensitivity: str) -> None:
    of = objective(setting)
    menu = menu_of(of)
    problem = menu_problem(menu, predicted_costs(of, changes_of(of, menu), sensitivity))
    room = (problem.smallest + sum(own[0].size for own in menu.values())) // 2
    found = allocate(of, menu, room, sensitivity)
    assert problem.size(found) <= room
    best = min(problem.loss(choice) for choice in all_choices(problem) if problem.size(choice) <= room)
    assert problem.loss(found) == pytest.approx(best, rel=1e-3, abs=1e-15)


def test_one_block_of_all_layers_is_the_best_under_the_whole_matrix() -> None:
    for seed in range(4):
        costs = normal(seed, 12, 12)
        costs = costs @ costs.T
        groups = [
            ChoiceGroup(
                f"layer {k}", tuple(Candidate(f"{b}", 10 + 3 * b, float(costs[3 * k + b, 3 * k + b])) for b in range(3))
            )
            for k in range(4)
        ]
        problem = Problem(tuple(groups))

        def whole(choice: Choice, costs: Tensor = costs) -> float:
            places = [3 * group + own for group, own in enumerate(choice)]
            return float(costs[places][:, places].sum())

        for partition in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]):
            joint = joint_problem(problem, costs, partition)
            room = 50
            fitting = [c for c in all_choices(joint) if joint.size(c) <= room]
            chosen = min(fitting, key=joint.loss)
            single = single_choice(problem, partition, chosen)
            assert problem.size(single) == joint.size(chosen) <= room
            if len(partition) == 1:
                best = min(whole(c) for c in all_choices(problem) if problem.size(c) <= room)
                assert joint.loss(chosen) == pytest.approx(whole(single)) == pytest.approx(best)
            if len(partition) == 4:
                assert joint.loss(chosen) == pytest.approx(problem.loss(single))
    many = Problem(tuple(ChoiceGroup(f"{k}", groups[0].candidates) for k in range(14)))
    with pytest.raises(OptionError, match="has 4,782,969 candidates"):
        joint_problem(many, torch.eye(42), [list(range(14))])


def test_blocks_are_planned_on_a_network_and_put_in_place() -> None:
    of = objective("mlp")
    menu = menu_of(of)
    room = sum(own[1].size for own in menu.values())
    choice = allocate(of, menu, room, "q-vlm")
    assert sum(own[place].size for own, place in zip(menu.values(), choice, strict=True)) <= room
    use(of, menu, choice)
    for (name, own), place in zip(menu.items(), choice, strict=True):
        assert torch.equal(of.named[name], own[place].weight)


# Bisection


def careful(seed: int, groups: int, levels: int) -> Problem:
    losses = normal(seed, groups, levels).exp().cumsum(1)
    return Problem(
        tuple(
            ChoiceGroup(f"{k}", tuple(Candidate(f"{b}", 100 - 10 * b, float(losses[k, b])) for b in range(levels)))
            for k in range(groups)
        )
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 17), levels=st.integers(1, 4), share=st.floats(0, 1))
def test_what_bisection_finds_was_accepted_and_one_more_was_not(
    seed: int, groups: int, levels: int, share: float
) -> None:
    problem = careful(seed, groups, levels)
    least, most = problem.loss((0,) * groups), problem.loss((levels - 1,) * groups)
    limit, measured = least + share * (most - least), list[Choice]()

    def accepts(choice: Choice) -> bool:
        measured.append(choice)
        return problem.loss(choice) <= limit * (1 + 1e-12)

    found = smallest_accepted(problem, accepts)
    assert found in measured
    assert problem.loss(found) <= limit * (1 + 1e-12)
    assert len(measured) <= 1 + (levels - 1) * (math.ceil(math.log2(groups + 1)) + 1)
    for level in range(1, levels):  # in the order of the list the next one that stopped at `level` is too much
        stopped = [place for place in range(groups) if found[place] == level - 1]
        deeper = [place for place in range(groups) if found[place] >= level]
        if stopped and max(found) == level:
            cheapest = min(stopped, key=lambda place: problem.groups[place].candidates[level].loss)
            lowered = tuple(level if place == cheapest else own for place, own in enumerate(found))
            assert not accepts(lowered)
            listed = problem.groups[cheapest].candidates[level].loss
            assert all(problem.groups[place].candidates[level].loss <= listed for place in deeper)


def test_a_floor_that_nothing_reaches_is_refused() -> None:
    with pytest.raises(OptionError, match="not even the most careful choice"):
        smallest_accepted(careful(0, 3, 3), lambda choice: False)
    uneven = Problem((careful(0, 1, 2).groups[0], careful(0, 1, 3).groups[0]))
    with pytest.raises(OptionError, match="as many candidates"):
        smallest_accepted(uneven, lambda choice: True)


# What is refused


def test_what_has_no_meaning_is_said() -> None:
    of = objective()
    with pytest.raises(OptionError, match=r"no sensitivity 'hawk'; there are hawq, hawq-v2, q-bert"):
        predicted_costs(of, changes(of), "hawk")
    name = of.names[0]
    with pytest.raises(OptionError, match="does not fit the parameter"):
        interactions(gauss_newton(of), of, {name: [torch.zeros(2)]})
    first, second = changes(of).items()
    with pytest.raises(OptionError, match="each needs as many candidates"):
        predicted_costs(of, {first[0]: first[1], second[0]: second[1][:1]}, "inter-layer")
    with pytest.raises(OptionError, match="nothing fits into 1 bytes"):
        allocate(of, menu_of(of), 1)


# On checkpoints


@pytest.mark.parametrize("allocation", ["hawq", "hawq-v2"])
def test_a_checkpoint_is_planned_by_a_number_a_layer(allocation: str, half_folder: FolderOf) -> None:
    model = half_folder("llama")
    plan = hesse.plan(model, mean_bits=3.6, data=IDS, method="rtn", allocation=allocation).report
    assert plan.bits_per_weight <= 3.6
    uniform = [point for point in plan.front if point["kind"] == "uniform"]
    (chosen,) = [point for point in plan.front if point["kind"] == "chosen"]
    assert all(point["predicted"] >= chosen["predicted"] for point in uniform if point["bytes"] <= chosen["bytes"])


def test_a_number_a_layer_is_that_of_its_kronecker_factors(half_folder: FolderOf) -> None:
    _, _, network = open_networks(half_folder("llama"), torch.device("cpu"))
    menu = make_menu(network, find_method("rtn"), Options(), (), "transformers", "auto")
    group = menu[0]
    layer = group.layers[0]
    with network.loaded(network.blocks[0]):
        rows, columns = layer.weight.shape
        output, inputs = normal(1, rows, 2 * rows).float(), normal(2, columns, 2 * columns).float()
        gram = Gram(second_moment=inputs @ inputs.T, tokens=5)
        factor = output @ output.T
        for name in ("hawq", "hawq-v2"):
            meter = CostMeter(menu, find_sensitivity(name))
            meter._add(layer, gram, factor)
            sides = [torch.linalg.eigvalsh(side.double()) for side in (factor, gram.second_moment)]
            product = (
                float(sides[0].sum() * sides[1].sum()) if name == "hawq-v2" else float(sides[0][-1] * sides[1][-1])
            )
            for offer, cost in zip(group.offers, meter.costs[group.name], strict=True):
                constraint = offer.constraints[layer.name]
                change = 0.0
                if constraint is not None:
                    weight = layer.weight.float()
                    change = float((constraint.nearest(weight) - weight).double().square().sum())
                assert cost == pytest.approx(0.5 * product / layer.weight.numel() * change, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"allocation": "q-bert", "mean_bits": 3.6}, "hesse.planning.allocate on a module in memory"),
        ({"allocation": "hawq", "loss": 0.1}, "ranks layers and predicts no loss"),
        ({"allocation": "hawk", "mean_bits": 3.6}, "no sensitivity 'hawk'"),
    ],
)
def test_allocations_that_a_checkpoint_has_not(
    settings: dict[str, object], said: str, half_folder: FolderOf, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=said):
        hesse.plan(half_folder("llama"), data=IDS, **settings)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="how a budget is shared out"):
        hesse.compress(half_folder("llama"), tmp_path / "out", data=IDS, allocation="hawq-v2")
