"""Importance scores over a whole network, each against its definition; and what removal by them does."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import digits
import hesse
from hesse.curvature import CrossEntropy, Kronecker, Objective, RankOneSum
from hesse.errors import HesseError
from hesse.estimation import estimate_curvatures
from hesse.methods import METHODS, methods_of
from hesse.modules.prune import build_strategy
from hesse.partitions import Tiles
from hesse.scores import SCORES, Attack, LossEvidence, find_score
from hesse.testing import normal

BATCHES = [(normal(0, 5, 6), torch.tensor([0, 1, 2, 1, 0])), (normal(1, 3, 6), torch.tensor([2, 2, 0]))]
ATTACK = Attack(0.2, 3)
OF_WEIGHTS = [score.name for score in SCORES.values() if "weights" in score.parts]


def prune(model: nn.Module, data: Any, **options: Any) -> Any:
    return hesse.prune(model, data=data, what="weights", **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3)).double()


def objective(model: nn.Module | None = None) -> Objective:
    return Objective.of(net() if model is None else model, CrossEntropy(), BATCHES, ["0.weight", "2.weight"])


def weights_of(objective: Objective) -> Tensor:
    return objective.join([parameter.detach() for parameter in objective.parameters])


def costs(
    name: str, of: Objective | None = None, tile: tuple[int | None, int | None] = (1, 1), **options: Any
) -> Tensor:
    """The costs of all tiles by a score, with the Fisher of the data's own labels."""
    of = objective() if of is None else of
    evidence = LossEvidence(of, **{"kind": "empirical", "attack": ATTACK, **options})
    return find_score(name).costs(evidence, Tiles({name: weight.shape for name, weight in of.named.items()}, tile))


def loss(flat: Tensor, inputs: Tensor, targets: Tensor, model: nn.Module) -> Tensor:
    """The mean loss as a function of both weights as one vector."""
    weights = {"0.weight": flat[:24].view(4, 6), "2.weight": flat[24:].view(3, 4)}
    return nn.functional.cross_entropy(functional_call(model, weights, (inputs,)), targets)


def everything() -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*BATCHES, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def sample_gradients() -> Tensor:
    flat = weights_of(objective()).requires_grad_()
    inputs, targets = everything()
    rows = [torch.autograd.grad(loss(flat, inputs[k : k + 1], targets[k : k + 1], net()), flat)[0] for k in range(8)]
    return torch.stack(rows)


def test_apoptosis_is_a_weights_row_of_the_second_order_term() -> None:
    flat, (inputs, targets) = weights_of(objective()), everything()
    hessian = torch.autograd.functional.hessian(lambda w: loss(w, inputs, targets, net()), flat)
    found = costs("oba")
    torch.testing.assert_close(found, (flat * (hessian @ flat)).abs(), rtol=1e-9, atol=1e-12)


def test_gradient_and_magnitude_and_damage() -> None:
    flat, gradients = weights_of(objective()), sample_gradients()
    expected = {
        "gradient": (flat * gradients.mean(0)).abs(),
        "magnitude": flat.square(),
        "obd": 0.5 * flat.square() * gradients.square().mean(0),
    }
    for name, scores in expected.items():
        torch.testing.assert_close(costs(name), scores, rtol=1e-9, atol=1e-12)


def test_random_is_the_seeds() -> None:
    scores = [costs("random", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_matrix_free_pruning_is_that_of_the_dense_inverse() -> None:
    flat, gradients = weights_of(objective()), sample_gradients()
    evidence, scores = LossEvidence(objective(), "empirical"), costs("m-fac-network")
    curvature = find_score("m-fac-network").curvature(evidence)
    assert isinstance(curvature, RankOneSum)
    damped = gradients.T @ gradients / 8 + curvature.damping * torch.eye(36).double()
    inverse = torch.linalg.inv(damped)
    torch.testing.assert_close(scores, flat.square() / (2 * inverse.diagonal()), rtol=1e-6, atol=1e-12)
    pruned = prune(net(), BATCHES, method="m-fac-network", sparsity=0.5, kind="empirical").model
    gone = torch.zeros(36, dtype=torch.bool).index_fill(0, scores.argsort()[:18], True)
    moved = flat - inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], flat[gone])
    found = torch.cat([pruned.get_parameter(f"{k}.weight").flatten() for k in (0, 2)])
    torch.testing.assert_close(found.detach(), torch.where(gone, 0, moved), rtol=1e-6, atol=1e-8)
    masked = prune(net(), BATCHES, method="m-fac-network", kind="empirical", refit="none").model
    found = torch.cat([masked.get_parameter(f"{k}.weight").flatten() for k in (0, 2)])
    torch.testing.assert_close(found.detach(), torch.where(gone, 0, flat))


def attacked() -> Tensor:
    """The slow statement of projected gradient descent, sample by sample."""
    inputs, targets = everything()
    model, rows = net(), list[Tensor]()
    for start, label in zip(inputs, targets, strict=True):
        moved = start
        for _ in range(ATTACK.steps):
            moved = moved.detach().requires_grad_()
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(moved[None]), label[None]), moved)
            moved = moved + 2.5 * ATTACK.radius / ATTACK.steps * slope.sign()
            moved = torch.minimum(torch.maximum(moved, start - ATTACK.radius), start + ATTACK.radius)
        rows.append(moved.detach())
    return torch.stack(rows)


def test_an_attack_stays_near_and_hurts() -> None:
    found = torch.cat([inputs for inputs, _ in ATTACK.on(objective())])
    torch.testing.assert_close(found, attacked())
    inputs, targets = everything()
    assert float((found - inputs).abs().amax()) <= ATTACK.radius + 1e-12
    flat = weights_of(objective())
    assert loss(flat, found, targets, net()) > loss(flat, inputs, targets, net())
    bounded = Attack(0.5, 4, lowest=-0.1, highest=0.1).on(objective())
    assert all(float(inputs.abs().amax()) <= 0.1 for inputs, _ in bounded)


def test_masking_adversarial_damage() -> None:
    """½ dw_ij G_ii (A dw_i)_j with the factors of the loss on attacked inputs, by hand."""
    model, targets = net(), everything()[1]
    first = attacked()
    before = model[0](first)
    hidden = model[1](before)
    outputs = model[2](hidden)
    slopes = torch.autograd.grad(nn.functional.cross_entropy(outputs, targets, reduction="sum"), (before, outputs))
    expected = []
    for layer, inputs, slope in zip((model[0], model[2]), (first, hidden), slopes, strict=True):
        weight, factor = layer.weight.detach(), inputs.T @ inputs / 8
        for i in range(len(weight)):
            expected.append(0.5 * weight[i] * slope[:, i].square().mean() * (factor @ weight[i]))
    found = costs("mad")
    torch.testing.assert_close(found, torch.cat(expected).abs().detach(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("scope", ["network", "site"])
@pytest.mark.parametrize("score", OF_WEIGHTS)
def test_exactly_the_share_goes_and_in_steps_what_is_gone_stays_gone(score: str, scope: Any) -> None:
    model, gone = net(), list[Tensor]()
    before = deepcopy(model.state_dict())
    for steps in (1, 3):
        result = prune(model, BATCHES, method=score, sparsity=0.7, scope=scope, steps=steps, attack=ATTACK)
        report = result.report
        pieces = [result.model.get_parameter(f"{k}.weight").flatten() == 0 for k in (0, 2)]
        gone.append(torch.cat(pieces))
        if scope == "site":
            assert [int(piece.sum()) for piece in pieces] == [round(0.7 * 24), round(0.7 * 12)]
        assert int(gone[-1].sum()) == 25
        assert report.loss.predicted > 0
        assert [layer.name for layer in report.layers] == ["0", "2"]
    if score in ("magnitude", "random"):
        assert torch.equal(*gone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_prediction_is_of_the_exact_gauss_newton_matrix() -> None:
    result = prune(net(), BATCHES, method="obd", sparsity=0.3)
    inputs, _ = everything()
    flat = weights_of(objective())

    def outputs(weights: Tensor) -> Tensor:
        pieces = {"0.weight": weights[:24].view(4, 6), "2.weight": weights[24:].view(3, 4)}
        return functional_call(net(), pieces, (inputs,))

    jacobian = torch.autograd.functional.jacobian(outputs, flat)
    changed = torch.cat([result.model.get_parameter(f"{k}.weight").flatten() for k in (0, 2)]).detach()
    moved = jacobian @ (changed - flat)
    shares = outputs(flat).softmax(-1)
    variance = (shares * moved.square()).sum(-1) - (shares * moved).sum(-1).square()
    assert result.report.loss.predicted == pytest.approx(0.5 * variance.mean().item(), rel=1e-6)


def test_second_order_scores_beat_chance_on_trained_digits() -> None:
    model, data = digits.trained("conv"), digits.batches(samples=256)
    found = {
        score: prune(model, data, method=score, sparsity=0.5, layers=("block*",)).report.loss.measured
        for score in ("random", "magnitude", "obd", "m-fac-network")
    }
    assert all(found[score] < 0.2 * found["random"] for score in ("magnitude", "obd"))
    assert found["m-fac-network"] < 0.5 * min(found["magnitude"], found["obd"])


def test_layers_with_one_input_and_different_patches_have_factors_of_their_own() -> None:
    model, data = digits.trained("conv"), digits.batches(samples=64)
    names = ["block2.conv1.weight", "block2.shortcut.weight"]
    found = estimate_curvatures(Objective.of(model, CrossEntropy(), data, names), ["kronecker"], "empirical").kronecker
    seen = list[Tensor]()
    hook = model.block2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(data[0][0])
    hook.remove()
    points = seen[0][:, :, ::2, ::2].movedim(1, -1).flatten(0, 2)
    shortcut, wide = found[names[1]], found[names[0]]
    assert isinstance(shortcut, Kronecker)
    assert isinstance(wide, Kronecker)
    torch.testing.assert_close(shortcut.input_factor, points.T @ points / len(points), rtol=1e-4, atol=1e-5)
    middles = wide.input_factor.view(16, 3, 3, 16, 3, 3)[:, 1, 1, :, 1, 1]
    torch.testing.assert_close(middles, shortcut.input_factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "there is no method 'best' that prunes weights; there are random, gradient, oba"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"scope": "model"}, "the scope is 'network' or 'site'"),
        ({"steps": 0}, "steps are 1 or more"),
        ({"method": "mad"}, "give attack=hesse.scores.Attack"),
        ({"method": "obs"}, "the score obs judges a group by what reads it, not weights: choose one of random"),
        ({"method": "hawq"}, "the score hawq judges changes, not weights"),
        ({"refit": "all"}, "refit is 'least-squares' or 'none'"),
        ({"refit": "least-squares"}, "the score magnitude has no curvature to refit weights under"),
        ({"block": 3, "method": "m-fac-network"}, "the score m-fac-network judges weights, not tiles"),
        ({"block": 5}, "zeros in blocks of 5 need a width divisible by 5"),
        ({"sparsity": "2:4"}, "needs a width divisible by 4"),
        ({"sparsity": "1:2", "steps": 2}, "is reached in one step"),
        ({"keep": 0.5}, "the method magnitude has no option 'keep'; it has sparsity, scope"),
        ({"layers": ("3",)}, "the pattern '3' matches no layer"),
        ({"ignore": ("*",)}, "no layer is left to prune"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HesseError, match=message):
        prune(net(), BATCHES, **options)


def test_an_attack_is_on_floating_point_inputs() -> None:
    with pytest.raises(HesseError, match="a radius above 0"):
        Attack(0.0)
    ids = [(torch.tensor([[0, 1]]), torch.tensor([0]))]
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(HesseError, match="an attack moves inputs that are one tensor of floating-point numbers"):
        prune(model, ids, method="mad", attack=ATTACK)


@pytest.mark.parametrize("name", [name for name, row in methods_of("prune").items() if row.partition == "weights"])
def test_every_row_runs_from_its_entry(name: str) -> None:
    row = METHODS[name]
    result = row.run(net(), data=BATCHES, **({"attack": ATTACK} if name == "mad" else {}))
    assert result.report.method == row.score == name
    assert row.curvature == SCORES[name].uses
    assert result.report.removed == {"0": (18 - result.report.removed["2"][0], 24), "2": result.report.removed["2"]}
    assert {option.name for option in row.options()} == {*result.report.settings, "attack"} - {"score"}
    assert type(build_strategy("weights", name, {})).__name__ == "WeightRanking"


def test_blocks_and_patterns_are_zero_together() -> None:
    blocks = prune(net(), BATCHES, method="magnitude", sparsity=0.5, block=2, ignore=("2",)).model
    zero = (blocks.get_parameter("0.weight").view(4, 3, 2) == 0).sum(-1)
    assert sorted(zero.flatten().tolist()) == [0] * 6 + [2] * 6
    norms = net().get_parameter("0.weight").view(4, 3, 2).square().sum(-1)
    assert norms[zero == 2].max() <= norms[zero == 0].min()
    pattern = prune(net(), BATCHES, method="obd", sparsity="1:3", ignore=("2",)).model
    assert ((pattern.get_parameter("0.weight").view(4, 2, 3) != 0).sum(-1) == 1).all()


@pytest.mark.parametrize("tile", [(1, None), (None, 1), (2, 3), (None, None)])
def test_costs_of_tiles_are_their_definitions(tile: tuple[int | None, int | None]) -> None:
    of = objective(nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3)).double())
    of = Objective.of(of.model, CrossEntropy(), BATCHES, ["0.weight"])
    weight, parts = of.named["0.weight"].detach(), Tiles({"0.weight": torch.Size((4, 6))}, tile)
    inputs, targets = everything()
    gradients = torch.stack(
        [
            torch.autograd.grad(
                nn.functional.cross_entropy(of.model(inputs[k : k + 1]), targets[k : k + 1]), [*of.parameters]
            )[0]
            for k in range(8)
        ]
    )
    along = torch.stack([parts.sums({"0.weight": gradient * weight}) for gradient in gradients])
    expected = {
        "magnitude": parts.sums({"0.weight": weight.square()}),
        "gradient": along.mean(0).abs(),
        "fisher": along.square().mean(0) / 2,
        "obd": parts.sums({"0.weight": 0.5 * weight.square() * gradients.square().mean(0)}),
    }
    for name, wanted in expected.items():
        torch.testing.assert_close(costs(name, of, tile), wanted, rtol=1e-8, atol=1e-12)
    measured = costs("loss", of, tile)
    for part, mask in ((part, parts.masks([part])["0.weight"]) for part in range(parts.count)):
        copy = deepcopy(of.model)
        copy.get_parameter("0.weight").data[mask] = 0
        rise = Objective.of(copy, CrossEntropy(), BATCHES).value() - of.value()
        assert float(measured[part]) == pytest.approx(rise, abs=1e-12)


def test_every_score_says_its_definition_and_source() -> None:
    assert len(SCORES) >= 20
    for name, score in SCORES.items():
        assert score.name == name
        assert score.source
        assert len(score.help) > 20
        assert score.parts
