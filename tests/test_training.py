"""One loop that trains: what is held does not move, many batches equal one, and a run that was killed goes on."""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hesse.constraints import Codebook, Constraint, Grid, Sparse, Table
from hesse.curvature import CrossEntropy, SquaredError, UserLoss
from hesse.errors import DataError, HesseError, OptionError, OutputError
from hesse.progress import Silence
from hesse.testing import normal
from hesse.training import (
    Distillation,
    FinetuneReport,
    GradualSchedule,
    HeldCodes,
    HeldZeros,
    StraightThrough,
    Training,
    finetune,
    held_zeros,
)

CLASSES = 3
Batches = list[tuple[Tensor, Tensor]]


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1)


def adam(named: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(named, lr=0.03)


def momentum(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.5, momentum=0.9, weight_decay=0.01)


def constant(step: int, steps: int) -> float:
    return 1.0


def network(dropout: float = 0.0) -> nn.Sequential:
    """Two matrices and a kernel."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 4, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(8, CLASSES),
    ).double()


def batches(sizes: tuple[int, ...] = (4, 4, 4, 4)) -> Batches:
    inputs = normal(1, sum(sizes), 1, 8)
    targets = inputs[:, 0].unflatten(1, (4, 2)).sum(2)[:, :CLASSES].argmax(1)
    return list(zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True))


def pruned(constraint: Constraint, model: nn.Module) -> nn.Module:
    """With every matrix of it pruned by magnitude."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.shape[0] > CLASSES:
                parameter.copy_(constraint.nearest(parameter.flatten(1)).view_as(parameter))
    return model


def learned(found: FinetuneReport) -> bool:
    """Whether the loss over all batches fell by a good part."""
    return sum(found.losses[-4:]) < 0.8 * sum(found.losses[:4])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What is held


@pytest.mark.parametrize("constraint", [Sparse(0.6), Sparse(1, 3)], ids=str)
@pytest.mark.parametrize("optimizer", [momentum, adam])
def test_zeros_stay_zero_and_all_else_learns(constraint: Sparse, optimizer: Callable[[Any], Any]) -> None:
    model = pruned(constraint, network())
    before = weights(model)
    found = finetune(model, batches(), Training(steps=40, optimizer=optimizer), loss_function=CrossEntropy()).report
    for name, now in weights(model).items():
        held = (before[name] == 0) & (before[name].ndim > 1)
        assert bool((now[held] == 0).all())
        assert bool((now[~held] != before[name][~held]).all())
    assert learned(found)


def test_a_step_with_zeros_held_is_a_masked_step() -> None:
    """Each weight moves by -lr · mask ⊙ dL/dw, by plain autograd."""
    model, data = pruned(Sparse(0.5), network()), batches((16,))
    before, (inputs, targets) = copy.deepcopy(model), data[0]
    finetune(model, data, Training(steps=1, optimizer=sgd, rate=constant, clip=None), loss_function=CrossEntropy())
    nn.functional.cross_entropy(before(inputs), targets).backward()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert old.grad is not None
        mask = (old != 0) if old.ndim > 1 else torch.ones_like(old)
        torch.testing.assert_close(new, old - 0.1 * mask * old.grad)


def test_codes_stay_while_their_scales_learn() -> None:
    model, grid = network(), Grid(3, 8)
    layer: nn.Linear = model[3]  # type: ignore[assignment]
    code = grid.encode(layer.weight.detach())
    with torch.no_grad():
        layer.weight.copy_(grid.decode(code))
    held = HeldCodes(grid, code)
    found = finetune(
        model, batches(), Training(steps=40, optimizer=adam), loss_function=CrossEntropy(), held={"3.weight": held}
    ).report
    (factor,) = found.free["3.weight"]
    assert bool((factor != 1).all())
    trained = held.trained(factor)
    assert torch.equal(trained.codes, code.codes)
    torch.testing.assert_close(layer.weight.detach(), grid.decode(trained).double(), rtol=1e-6, atol=0)
    assert learned(found)


@pytest.mark.parametrize(
    "constraint", [Grid(3, 8), Grid(4, -1, symmetric=False), Table("fp4", 8), Codebook(2), Sparse(2, 4) & Grid(4, 8)]
)
def test_straight_through_weights_are_members_at_the_end_and_learn(constraint: Constraint) -> None:
    model = network()
    training = Training(steps=40, optimizer=adam)
    found = finetune(
        model, batches(), training, loss_function=CrossEntropy(), held={"3.weight": StraightThrough(constraint)}
    ).report
    (latent,) = found.free["3.weight"]
    assert torch.equal(model[3].weight.detach(), constraint.nearest(latent))
    assert not torch.equal(model[3].weight.detach(), constraint.nearest(network()[3].weight.detach()))
    assert learned(found)


def test_a_straight_through_step_gives_the_free_weight_the_gradient_at_the_member() -> None:
    model, data, grid = network(), batches((16,)), Grid(3, 8)
    start, (inputs, targets) = model[3].weight.detach().clone(), data[0]
    twin = network()
    with torch.no_grad():
        twin[3].weight.copy_(grid.nearest(start))
    nn.functional.cross_entropy(twin(inputs), targets).backward()
    training = Training(steps=1, optimizer=sgd, rate=constant, clip=None)
    found = finetune(
        model, data, training, loss_function=CrossEntropy(), held={"3.weight": StraightThrough(grid)}
    ).report
    assert twin[3].weight.grad is not None
    torch.testing.assert_close(found.free["3.weight"][0], start - 0.1 * twin[3].weight.grad)


def test_zeros_of_biases_and_norms_are_free() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    nn.init.zeros_(model[0].bias)
    assert held_zeros(model) == {}
    with torch.no_grad():
        model[2].weight[0, 1] = 0
    (held,) = held_zeros(model).values()
    assert isinstance(held, HeldZeros)
    assert held.kept.tolist() == [[True, False, True, True], [True] * 4]


# The loop


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_batches_are_one_large_batch(teacher: bool, reduction: Any) -> None:
    """Also of unequal sizes, with masked targets, and with what is clipped."""
    found = []
    parts = batches((5, 1, 6, 4))
    parts[0][1][2] = -100
    whole = [(torch.cat([i for i, _ in parts]), torch.cat([t for _, t in parts]))]
    for data, accumulation in ((parts, 4), (whole, 1)):
        model, dense = pruned(Sparse(0.5), network()), network()
        training = Training(
            steps=6, optimizer=adam, accumulation=accumulation, clip=0.1, teacher=dense if teacher else None
        )
        finetune(model, data, training, loss_function=CrossEntropy(reduction=reduction))
        found.append(weights(model))
    torch.testing.assert_close(*found)


def test_the_loss_learns_from_the_teacher_by_its_definition() -> None:
    model, dense, data = network(), copy.deepcopy(network()), batches((16,))
    with torch.no_grad():
        dense[3].weight.mul_(2)
    how = Distillation(share=0.7, temperature=3.0)
    training = Training(steps=1, optimizer=sgd, rate=constant, clip=None, teacher=dense, distillation=how)
    twin, (inputs, targets) = copy.deepcopy(model), data[0]
    before = weights(dense)
    found = finetune(model, data, training, loss_function=CrossEntropy()).report
    student, teacher = twin(inputs), dense(inputs).detach()
    task = nn.functional.cross_entropy(student, targets)
    divergence = nn.functional.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
    loss = 0.3 * task + 0.7 * 9 * divergence
    loss.backward()
    assert found.losses == pytest.approx([loss.item()])
    for old, new in zip(twin.parameters(), model.parameters(), strict=True):
        assert old.grad is not None
        torch.testing.assert_close(new, old - 0.1 * old.grad)
    torch.testing.assert_close(weights(dense), before, rtol=0, atol=0)


def test_a_teacher_of_numbers_counts_by_squared_differences() -> None:
    model, dense = nn.Linear(3, 2), nn.Linear(3, 2)
    inputs, targets = torch.randn(8, 3), torch.randn(8, 2)
    training = Training(steps=1, teacher=dense, distillation=Distillation(share=0.25))
    wanted = 0.75 * (model(inputs) - targets).square().mean() + 0.25 * (model(inputs) - dense(inputs)).square().mean()
    found = finetune(model, [(inputs, targets)], training, loss_function=SquaredError()).report
    assert found.losses == pytest.approx([wanted.item()])


def test_the_model_may_compute_in_half_precision_and_keeps_its_own() -> None:
    model = pruned(Sparse(0.5), network().float())
    seen: list[torch.dtype] = []
    model[3].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    data = [(inputs.float(), targets) for inputs, targets in batches()]
    training = Training(steps=40, optimizer=adam, precision=torch.bfloat16)
    found = finetune(model, data, training, loss_function=CrossEntropy()).report
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert learned(found)


def test_gradients_are_clipped_over_all_weights() -> None:
    model = network()
    before = weights(model)
    training = Training(steps=1, optimizer=sgd, rate=constant, clip=1e-3)
    finetune(model, batches(), training, loss_function=CrossEntropy())
    moved = sum(float((now - before[name]).square().sum()) for name, now in weights(model).items()) ** 0.5
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_weights_that_take_no_gradient_and_random_numbers_of_others_stay() -> None:
    model = pruned(Sparse(0.5), network(dropout=0.5))
    model[3].requires_grad_(False)
    before = weights(model)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    finetune(model, batches(), Training(steps=3), loss_function=CrossEntropy())
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(before["3.weight"], model[3].weight)
    assert not torch.equal(before["0.weight"], model[0].weight)


# Going on


class Killed(Silence):
    """Stops a training after some of its steps, as a signal would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Shuffled:
    """Three batches of samples in another order each time, with noise, by torch's random numbers."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = batches((12,))[0]
        for chosen in torch.randperm(12).split(5):
            yield inputs[chosen] + 0.1 * torch.randn(len(chosen), 1, 8, dtype=torch.float64), targets[chosen]


def loader() -> Any:
    data = [(i, t) for inputs, targets in batches((12,)) for i, t in zip(inputs, targets, strict=True)]
    generator = torch.Generator().manual_seed(3)
    return torch.utils.data.DataLoader(data, batch_size=5, shuffle=True, generator=generator)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [Shuffled, loader])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_killed_training_goes_on_to_the_same_weights(
    data: Callable[[], Any], accumulation: int, tmp_path: Path
) -> None:
    """Bit by bit: with dropout, momentum, batch statistics, shuffled and noisy data, killed three times."""

    def model() -> nn.Module:
        body = pruned(Sparse(0.5), network(dropout=0.3))
        return nn.Sequential(*body[:3], nn.BatchNorm1d(24).double(), *body[3:])  # type: ignore[index]

    training = Training(steps=17, optimizer=adam, accumulation=accumulation, teacher=model(), seed=4)
    whole = model()
    wanted = finetune(whole, data(), training, loss_function=CrossEntropy()).report
    for after in (7, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            finetune(
                model(), data(), training, loss_function=CrossEntropy(), checkpoint=tmp_path, checkpoint_every=2,
                progress=Killed(after),
            )  # fmt: skip
    for _ in range(2):  # the second time it is finished already
        last = model()
        found = finetune(
            last, data(), training, loss_function=CrossEntropy(), checkpoint=tmp_path, checkpoint_every=2
        ).report
        assert found.losses == wanted.losses
        assert all(
            torch.equal(a, b) for a, b in zip(whole.state_dict().values(), last.state_dict().values(), strict=True)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


@pytest.mark.parametrize(
    ("changed", "what"),
    [({"seed": 1}, "seed"), ({"optimizer": sgd}, "optimizer"), ({"clip": None}, "clip"), ({"weights": 1}, "weights")],
)
def test_another_training_is_refused(changed: dict[str, Any], what: str, tmp_path: Path) -> None:
    model, settings = network(), {"steps": 2}
    finetune(model, batches(), Training(**settings), loss_function=CrossEntropy(), checkpoint=tmp_path)  # type: ignore[arg-type]
    again = model if changed.pop("weights", 0) else network()
    with pytest.raises(OutputError, match=f"differs from this one in its {what}: give another folder"):
        finetune(
            again, batches(), Training(**{**settings, **changed}), loss_function=CrossEntropy(), checkpoint=tmp_path
        )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"\x80\x02cos\nsystem\n."])
def test_a_damaged_checkpoint_is_refused_and_runs_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(OutputError, match="cannot be read"):
        finetune(network(), batches(), Training(steps=1), loss_function=CrossEntropy(), checkpoint=tmp_path)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "accumulation": 0}, "accumulation 0"),
        ({"steps": 1, "clip": 0.0}, "clip is 0"),
        ({"steps": 1, "precision": torch.float16}, "precision is torch.float16"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Training(**options)


def test_what_does_not_fit_is_refused_before_any_step() -> None:
    model = network()
    before = weights(model)
    train = Training(steps=1)

    def refused(message: str, training: Training = train, loss: Any = CrossEntropy(), **options: Any) -> None:  # noqa: B008
        with pytest.raises(HesseError, match=message):
            finetune(model, options.pop("data", batches()), training, loss_function=loss, **options)
        assert all(torch.equal(before[name], now) for name, now in weights(model).items())

    refused("no parameter '9.weight' to hold", held={"9.weight": StraightThrough(Grid())})
    refused("a mask", held={"3.weight": HeldZeros(torch.ones(2, 2, dtype=torch.bool))})
    refused("width divisible by 5", held={"3.weight": StraightThrough(Sparse(2, 5))})
    refused("give a copy of it", Training(steps=1, teacher=model))
    user = UserLoss(function=lambda outputs, targets: outputs.square().sum(1))
    refused("no distillation for a UserLoss", Training(steps=1, teacher=network()), user)
    refused("walked only once", data=iter(batches()))
    refused("no batch", data=[])
    with pytest.raises(OptionError, match="share of distillation"):
        Distillation(share=1.5)
    with pytest.raises(OptionError, match="temperature"):
        Distillation(temperature=0)


def test_a_loss_that_is_not_finite_stops_before_it_does_harm() -> None:
    model, data = network(), batches()
    data[2] = (data[2][0] * torch.inf, data[2][1])
    with pytest.raises(DataError, match="loss of step 2 is not finite"):
        finetune(model, data, Training(steps=5), loss_function=CrossEntropy())
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# The schedule


@given(
    final=st.floats(0.01, 0.99),
    share=st.floats(0, 1),
    cuts=st.integers(1, 30),
    steps=st.integers(100, 5000),
    rest=st.floats(0, 0.6),
)
@settings(max_examples=100, deadline=None, database=None)
def test_a_gradual_schedule_rises_and_ends_where_it_must(
    final: float, share: float, cuts: int, steps: int, rest: float
) -> None:
    schedule = GradualSchedule(final, steps, cuts, first=share * final, rest=rest)
    shares = schedule.shares
    assert len(shares) == len(schedule.cut_steps) == cuts
    assert shares[-1] == final
    assert cuts == 1 or shares[0] == pytest.approx(share * final)
    rises = [b - a for a, b in pairwise(shares)]
    assert all(rise >= 0 for rise in rises)
    assert all(b <= a + 1e-12 for a, b in pairwise(rises))
    assert schedule.cut_steps[0] == 0
    assert all(schedule.share(step) == now for step, now in zip(schedule.cut_steps, shares, strict=True))
    assert schedule.share(steps - 1) == final
    rates = [schedule.rate(step, steps) for step in range(steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(rates[step] == 1 for step in schedule.cut_steps)
    falls = set(range(1, steps)) - set(schedule.cut_steps)
    assert all(rates[step] < rates[step - 1] for step in falls)


def test_a_schedule_that_cannot_be_is_refused() -> None:
    for options, message in [
        ({"final": 1.0}, "final sparsity is 1.0"),
        ({"final": 0.4}, "first cut is to 0.5"),
        ({"final": 0.9, "rest": 1.0}, "rest is 1.0"),
        ({"final": 0.9, "cuts": 90}, "90 cuts do not fit into 100 steps"),
    ]:
        with pytest.raises(OptionError, match=message):
            GradualSchedule(steps=100, **options)  # type: ignore[arg-type]
