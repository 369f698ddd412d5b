"""Cuts with training in between, and step variants of that training against their formulas in plain autograd."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from helpers import compress_module
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.constraints import Sparse
from hesse.curvature import CrossEntropy
from hesse.curvature.losses import next_tokens
from hesse.data import read_samples
from hesse.errors import HesseError, OptionError, OutputError
from hesse.methods import Options
from hesse.modules.gradual import GradualReport, prune_gradually
from hesse.progress import Silence
from hesse.testing import normal
from hesse.training import (
    CompressionAware,
    Distillation,
    GradualSchedule,
    Movement,
    Training,
    finetune,
    prunable_weights,
)

RATE = 0.3
PLAIN: dict[str, Any] = {
    "optimizer": lambda named: torch.optim.SGD(named, lr=RATE),
    "rate": lambda step, steps: 1.0,
    "clip": None,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(number: int = 3) -> list[tuple[Tensor, Tensor]]:
    inputs = normal(1, 16 * number, 8)
    return list(zip(inputs.split(16), inputs[:, :3].argmax(1).split(16), strict=True))


def gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """By plain autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(
        zip(names, torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), parameters), strict=True)
    )


@pytest.mark.parametrize("pattern", [Sparse(0.75), Sparse(0.75, scope="row"), Sparse(1, 4)])
def test_movement_follows_its_definition(pattern: Sparse) -> None:
    """Scores: s ← s - rate · (dL/dw') ⊙ w and w ← w - rate · mask ⊙ dL/dw', w' = mask ⊙ w of the highest s."""
    steps, model, data = 9, network(), batches()
    schedule = GradualSchedule(0.75, steps, cuts=4, first=0.0)
    weight, scores, twin = model[0].weight.detach().clone(), torch.zeros(8, 8).double(), network()
    masks = []
    for step in range(steps):
        share = schedule.share(step)
        if pattern.of is None:
            mask = Sparse(share, scope=pattern.scope).mask(scores)
        else:
            kept = {0.0: 4, 0.25: 3, 0.5: 2, 0.75: 1}[int(share * 4) / 4]
            mask = Sparse(kept, 4).mask(scores) if kept < 4 else torch.ones_like(scores)
        masks.append(mask)
        with torch.no_grad():
            twin[0].weight.copy_(mask * weight)
        found = gradients(twin, *data[step % 3])
        scores -= RATE * found["0.weight"] * weight
        weight -= RATE * found["0.weight"] * mask
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name != "0.weight":
                    parameter -= RATE * found[name]
    assert not torch.equal(masks[0].double(), masks[-1].double())
    held = {"0.weight": Movement(pattern, schedule)}
    free = finetune(model, data, Training(steps=steps, **PLAIN), loss_function=CrossEntropy(), held=held).report.free[
        "0.weight"
    ]
    torch.testing.assert_close(free, (weight, scores))
    torch.testing.assert_close(model[2].weight, twin[2].weight)
    final = Sparse(1, 4) if pattern.of else pattern
    torch.testing.assert_close(model[0].weight, final.mask(scores) * weight)


def test_movement_needs_scores_before_the_first_cut() -> None:
    with pytest.raises(OptionError, match=r"give first=0\.0"):
        Movement(Sparse(0.75), GradualSchedule(0.75, 100))


@pytest.mark.parametrize("pattern", [Sparse(0.75), Sparse(2, 4)])
def test_a_compression_aware_step_follows_its_formula(pattern: Sparse) -> None:
    """By w ← w - rate (∇L(w) + m ⊙ ∇L(C(w + rho ∇L(w))))."""
    model, (batch, *_) = network(), batches()
    at, rho = copy.deepcopy(model), 0.5
    dense = gradients(at, *batch)
    mask = torch.ones(())
    with torch.no_grad():
        for name, parameter in at.named_parameters():
            parameter += rho * dense[name]
            if name == "0.weight":
                mask = pattern.mask(parameter.abs())
                parameter *= mask
    pruned = gradients(at, *batch)
    pruned["0.weight"] *= mask
    wanted = {
        name: parameter.detach() - RATE * (dense[name] + pruned[name]) for name, parameter in model.named_parameters()
    }
    rule = CompressionAware(("0.weight",), (pattern,), rho)
    found = finetune(model, [batch], Training(steps=1, **PLAIN), loss_function=CrossEntropy(), rule=rule).report
    torch.testing.assert_close(dict(model.named_parameters()), wanted, check_dtype=False)
    assert len(found.losses) == 1


def test_compression_aware_steps_draw_their_pattern_and_repeat_with_the_seed() -> None:
    patterns = (Sparse(0.25), Sparse(0.5), Sparse(0.75))
    seen: list[float] = []

    class Watched(CompressionAware):
        def direction(self, weights: Any, gradients: Callable[[], Any], step: int) -> Any:
            def watched() -> Any:
                seen.append(float((weights["0.weight"] == 0).double().mean()))
                return gradients()

            return super().direction(weights, watched, step)

    found = []
    for seed in (0, 0, 1):
        model = network()
        training = Training(steps=30, seed=seed, **PLAIN)
        finetune(model, batches(), training, loss_function=CrossEntropy(), rule=Watched(("0.weight",), patterns))
        found.append(model[0].weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert set(seen[::2]) == {0.0}
    assert set(seen[1::2]) == {0.25, 0.5, 0.75}


def test_a_compression_aware_rule_that_cannot_be_is_refused() -> None:
    for rule, message in [
        (lambda: CompressionAware(()), "prunes nothing"),
        (lambda: CompressionAware(("0.weight",), rho=0), "rho is 0"),
        (lambda: CompressionAware(("9.weight",)), "'9.weight', which is to be pruned"),
        (lambda: CompressionAware(("0.weight",), (Sparse(2, 5),)), "divisible by 5"),
    ]:
        with pytest.raises(OptionError, match=message):
            finetune(network(), batches(), Training(steps=1), loss_function=CrossEntropy(), rule=rule())


# Cuts by rows of the table


class Zeros(Silence):
    """Keeps what is zero after each step, and stops after some of them."""

    def __init__(self, model: nn.Module, after: int = 10**6) -> None:
        self.model, self.left = model, after
        self.seen: list[list[Tensor]] = []

    def advance(self) -> None:
        self.seen.append([parameter == 0 for parameter in self.model.parameters() if parameter.ndim > 1])
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def single() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    return network().float(), [(inputs.float(), targets) for inputs, targets in batches()]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "obert"])
def test_any_row_that_prunes_is_gradual(method: str) -> None:
    """Shares follow the schedule exactly, and between cuts no zero moves."""
    model, data = single()
    watch = Zeros(model)
    training = Training(
        steps=20, teacher=copy.deepcopy(model), optimizer=lambda named: torch.optim.Adam(named, lr=0.01)
    )
    options = Options(scope="layer") if method == "wanda" else None
    found = prune_gradually(
        model,
        data,
        training,
        0.75,
        loss_function=CrossEntropy(),
        method=method,
        options=options,
        cuts=4,
        progress=watch,
    ).report
    schedule = GradualSchedule(0.75, 20, 4, first=0.7 * 0.75)
    assert [cut.step for cut in found.cuts] == list(schedule.cut_steps)
    for step, zeros in enumerate(watch.seen):
        for zero in zeros:
            assert int(zero.sum()) == round(schedule.share(step) * zero.numel())
    for step in set(range(1, 20)) - set(schedule.cut_steps):
        assert all(torch.equal(a, b) for a, b in zip(watch.seen[step - 1], watch.seen[step], strict=True))
    assert any(cut.loss_after != cut.loss_before for cut in found.cuts)


def test_one_cut_is_one_shot_and_recovery() -> None:
    training = Training(steps=10, optimizer=lambda named: torch.optim.Adam(named, lr=0.01))
    gradual, data = single()
    options = Options(damping=0.1)
    prune_gradually(
        gradual, data, training, "2:4", loss_function=CrossEntropy(), method="sparsegpt", options=options, cuts=1
    )
    pattern = Options(sparsity="2:4", damping=0.1)
    pruned = compress_module(
        single()[0], data, method="sparsegpt", options=pattern, loss_function=CrossEntropy()
    ).module
    finetune(pruned, data, training, loss_function=CrossEntropy())
    assert all(torch.equal(a, b) for a, b in zip(gradual.parameters(), pruned.parameters(), strict=True))


def test_a_pattern_is_reached_by_way_of_others() -> None:
    model, data = single()
    found = prune_gradually(
        model, data, Training(steps=12), "1:4", loss_function=CrossEntropy(), method="sparsegpt", cuts=5, first=0.0
    ).report
    assert [cut.sparsity for cut in found.cuts] == ["3:4", "2:4", "1:4"]
    assert bool((model[0].weight.view(8, 2, 4) != 0).sum(2).eq(1).all())  # type: ignore[index, operator]


@pytest.mark.parametrize("method", ["magnitude", "obert"])
def test_a_killed_gradual_pruning_goes_on_to_the_same_weights(method: str, tmp_path: Path) -> None:
    training = Training(steps=16, optimizer=lambda named: torch.optim.Adam(named, lr=0.01))

    def run(after: int, **kept: Any) -> tuple[nn.Module, GradualReport]:
        model, pairs = single()
        samples = [pair for inputs, targets in pairs for pair in zip(inputs, targets, strict=True)]
        data = DataLoader(samples, 16, shuffle=True, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
        found = prune_gradually(
            model,
            data,
            training,
            0.75,
            loss_function=CrossEntropy(),
            method=method,
            cuts=4,
            progress=Zeros(model, after),
            **kept,
        ).report
        return model, found

    whole, wanted = run(100)
    for after in (2, 5, 4):
        with pytest.raises(KeyboardInterrupt):
            run(after, checkpoint=tmp_path, checkpoint_every=2)
    model, found = run(100, checkpoint=tmp_path, checkpoint_every=2)
    assert found == wanted
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    with pytest.raises(OutputError, match="differs from this one in its method"):
        prune_gradually(single()[0], batches(), training, 0.5, loss_function=CrossEntropy(), checkpoint=tmp_path)


def test_what_does_not_fit_is_refused_before_any_step() -> None:
    model, data = single()
    before = copy.deepcopy(model.state_dict())

    def refused(message: str, sparsity: float | str = 0.5, **options: Any) -> None:
        with pytest.raises(HesseError, match=message):
            prune_gradually(model, data, Training(steps=20), sparsity, loss_function=CrossEntropy(), **options)
        assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())

    refused("the method rtn makes no zeros", method="rtn")
    refused("there is no method 'surgery'", method="surgery")
    refused("width divisible by 5", "2:5")
    refused("sparsity is 1.5", 1.5)
    refused("the pattern '9' matches no layer", layers=("9",))
    refused("first cut is to 0.8", first=0.8)
    refused("10 cuts do not fit", rest=0.9)
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    refused(r"0\.weight is to be pruned but takes no gradient")


def test_weights_that_can_be_pruned_are_found_by_the_names_of_layers() -> None:
    assert prunable_weights(network()) == ("0.weight", "2.weight")
    assert prunable_weights(network(), "2:4", ignore=("0",)) == ("2.weight",)
    with pytest.raises(OptionError, match="divisible by 5"):
        prunable_weights(network(), "2:5")


@pytest.mark.parametrize("method", ["magnitude", "obert"])
def test_a_classifier_survives_nine_zeros_of_ten_step_by_step_and_not_at_once(method: str) -> None:
    digits = pytest.importorskip("digits")
    dense = digits.trained("mlp")
    data, options = digits.batches(), Options(sparsity=0.9, scope="layer")
    at_once = compress_module(dense, data[:8], method=method, options=options, loss_function=CrossEntropy()).module
    model = copy.deepcopy(dense)
    training = Training(steps=120, teacher=dense, optimizer=lambda named: torch.optim.Adam(named, lr=4e-3))
    prune_gradually(model, data, training, 0.9, loss_function=CrossEntropy(), method=method, cuts=4, calibration=8)
    zeros = [int((parameter == 0).sum()) / parameter.numel() for parameter in model.parameters() if parameter.ndim > 1]
    assert zeros == pytest.approx([0.9] * len(zeros), abs=1e-3)
    assert digits.accuracy(model) > 0.9 > digits.accuracy(at_once)


@pytest.mark.slow
def test_the_default_language_model_is_pruned_gradually_and_recovers() -> None:
    """A few steps of 2:4 with a teacher, in bfloat16; KL to the dense model falls while zeros are held."""
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32, trust_remote_code=False)
    dense = copy.deepcopy(model)
    options: dict[str, Any] = {"seed": 0, "purpose": "calibration", "limit": None}
    ids = read_samples(None, DEFAULT_FOLDER, count=8, length=32, **options)[0].batches(2)
    data = [(some, next_tokens(some)) for some in ids]
    training = Training(
        steps=6,
        teacher=dense,
        distillation=Distillation(share=1.0, temperature=1.0),
        precision=torch.bfloat16,
        accumulation=2,
    )
    found = prune_gradually(
        model,
        data,
        training,
        "2:4",
        loss_function=CrossEntropy(),
        forward=lambda network, inputs: network(input_ids=inputs).logits,
        method="wanda",
        cuts=1,
        layers=("*.6.mlp.*",),
    ).report
    assert [cut.sparsity for cut in found.cuts] == ["2:4"]
    assert sum(found.losses[-2:]) < 0.9 * sum(found.losses[:2])
    for name, parameter in model.named_parameters():
        if ".6.mlp." in name:
            assert bool((parameter.view(len(parameter), -1, 4) == 0).sum(2).eq(2).all())
        elif parameter.ndim > 1:
            assert bool((parameter != 0).any(1).all())
