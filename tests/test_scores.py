"""Importance scores over a whole network, each against its definition; and what removal by them does."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hesse.scores.weights import SCORES, ScoreOptions, weights_of
from torch import Tensor, nn
from torch.func import functional_call

import digits
import hesse
from hesse.curvature import CrossEntropy, Kronecker, Objective, RankOneSum
from hesse.errors import HesseError
from hesse.estimation import estimate_curvatures
from hesse.methods import TABLE
from hesse.scores.attack import Attack
from hesse.testing import normal

BATCHES = [(normal(0, 5, 6), torch.tensor([0, 1, 2, 1, 0])), (normal(1, 3, 6), torch.tensor([2, 2, 0]))]
ATTACK = Attack(0.2, 3)
EMPIRICAL = ScoreOptions(kind="empirical", attack=ATTACK)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3)).double()


def objective(model: nn.Module | None = None) -> Objective:
    return Objective.of(net() if model is None else model, CrossEntropy(), BATCHES, ["0.weight", "2.weight"])


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
    found = SCORES["oba"](objective(), EMPIRICAL).scores
    torch.testing.assert_close(found, (flat * (hessian @ flat)).abs(), rtol=1e-9, atol=1e-12)


def test_gradient_and_magnitude_and_damage() -> None:
    flat, gradients = weights_of(objective()), sample_gradients()
    expected = {
        "gradient": (flat * gradients.mean(0)).abs(),
        "magnitude": flat.square(),
        "obd": 0.5 * flat.square() * gradients.square().mean(0),
    }
    for name, scores in expected.items():
        torch.testing.assert_close(SCORES[name](objective(), EMPIRICAL).scores, scores, rtol=1e-9, atol=1e-12)


def test_random_is_the_seeds() -> None:
    scores = [SCORES["random"](objective(), ScoreOptions(seed=seed)).scores for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_matrix_free_pruning_is_that_of_the_dense_inverse() -> None:
    flat, gradients = weights_of(objective()), sample_gradients()
    judged = SCORES["m-fac-network"](objective(), EMPIRICAL)
    assert isinstance(judged.curvature, RankOneSum)
    damped = gradients.T @ gradients / 8 + judged.curvature.damping * torch.eye(36).double()
    inverse = torch.linalg.inv(damped)
    torch.testing.assert_close(judged.scores, flat.square() / (2 * inverse.diagonal()), rtol=1e-6, atol=1e-12)
    report = hesse.prune_module(net(), BATCHES, score="m-fac-network", sparsity=0.5, kind="empirical")
    gone = torch.zeros(36, dtype=torch.bool).index_fill(0, judged.scores.argsort()[:18], True)
    moved = flat - inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], flat[gone])
    found = torch.cat([report.module.get_parameter(f"{k}.weight").flatten() for k in (0, 2)])
    torch.testing.assert_close(found.detach(), torch.where(gone, 0, moved), rtol=1e-6, atol=1e-8)
    masked = hesse.prune_module(net(), BATCHES, score="m-fac-network", kind="empirical", update=False)
    found = torch.cat([masked.module.get_parameter(f"{k}.weight").flatten() for k in (0, 2)])
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
    found = SCORES["mad"](objective(), EMPIRICAL).scores
    torch.testing.assert_close(found, torch.cat(expected).abs().detach(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("scope", ["network", "layer"])
@pytest.mark.parametrize("score", SCORES)
def test_exactly_the_share_goes_and_in_steps_what_is_gone_stays_gone(score: str, scope: Any) -> None:
    model, gone = net(), list[Tensor]()
    before = deepcopy(model.state_dict())
    for steps in (1, 3):
        report = hesse.prune_module(model, BATCHES, score=score, sparsity=0.7, scope=scope, steps=steps, attack=ATTACK)
        pieces = [report.module.get_parameter(f"{k}.weight").flatten() == 0 for k in (0, 2)]
        gone.append(torch.cat(pieces))
        if scope == "layer":
            assert [int(piece.sum()) for piece in pieces] == [round(0.7 * 24), round(0.7 * 12)]
        assert int(gone[-1].sum()) == 25
        assert report.predicted_loss_increase > 0
        assert [layer.name for layer in report.layers] == ["0", "2"]
    if score in ("magnitude", "random"):
        assert torch.equal(*gone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_prediction_is_of_the_exact_gauss_newton_matrix() -> None:
    report = hesse.prune_module(net(), BATCHES, score="obd", sparsity=0.3)
    inputs, _ = everything()
    flat = weights_of(objective())

    def outputs(weights: Tensor) -> Tensor:
        pieces = {"0.weight": weights[:24].view(4, 6), "2.weight": weights[24:].view(3, 4)}
        return functional_call(net(), pieces, (inputs,))

    jacobian = torch.autograd.functional.jacobian(outputs, flat)
    changed = torch.cat([report.module.get_parameter(f"{k}.weight").flatten() for k in (0, 2)]).detach()
    moved = jacobian @ (changed - flat)
    shares = outputs(flat).softmax(-1)
    variance = (shares * moved.square()).sum(-1) - (shares * moved).sum(-1).square()
    assert report.predicted_loss_increase == pytest.approx(0.5 * variance.mean().item(), rel=1e-6)


def test_second_order_scores_beat_chance_on_trained_digits() -> None:
    model, data = digits.trained("conv"), digits.batches(samples=256)
    found = {
        score: hesse.prune_module(model, data, score=score, sparsity=0.5, layers=("block*",)).measured_loss_increase
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
        ({"score": "best"}, "there is no score 'best'; there are random, magnitude, gradient, oba, obd"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"scope": "model"}, "the scope is 'network' or 'layer'"),
        ({"steps": 0}, "steps are 1 or more"),
        ({"score": "mad"}, "give attack=hesse.modules.Attack"),
        ({"layers": ("3",)}, "the pattern '3' matches no layer"),
        ({"ignore": ("*",)}, "no layer is left to prune"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HesseError, match=message):
        hesse.prune_module(net(), BATCHES, **options)


def test_an_attack_is_on_floating_point_inputs() -> None:
    with pytest.raises(HesseError, match="a radius above 0"):
        Attack(0.0)
    ids = [(torch.tensor([[0, 1]]), torch.tensor([0]))]
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(HesseError, match="an attack moves inputs that are one tensor of floating-point numbers"):
        hesse.prune_module(model, ids, score="mad", attack=ATTACK)


def test_rows_name_scores_that_there_are() -> None:
    ours = [row for row in TABLE if row.run.startswith("hesse.prune_module")]
    assert {row.name for row in ours} == SCORES.keys() - {"magnitude", "obd"}
