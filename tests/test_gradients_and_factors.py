"""Per-sample gradients and Kronecker factors of small networks against loops over samples by plain autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hesse.curvature import CrossEntropy, Fisher, GaussNewton, Hessian, Objective
from hesse.errors import DataError, OptionError, UnsupportedModelError
from hesse.estimation import (
    eigen_kronecker,
    fisher_blocks,
    fisher_diagonal,
    fisher_rank_one_sum,
    kronecker_factors,
    per_sample_gradients,
)
from hesse.testing import normal
from small_nets import Attention, everything, make

NETS = pytest.mark.parametrize("setting", ["mlp", "conv", "attention", "linear"])
KINDS = pytest.mark.parametrize("kind", ["empirical", "sampled"])
PERS = pytest.mark.parametrize("per", ["position", "sample"])


def samples(objective: Objective, kind: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Each sample as a batch of one, with the labels that estimators use."""
    found = []
    for index, (inputs, targets) in enumerate(objective.batches()):
        if kind == "sampled":
            generator = torch.Generator().manual_seed(seed + index)
            targets = objective.loss.sampled_targets(objective.outputs(inputs), targets, generator)
        found += list(zip(inputs.split(1), targets.split(1), strict=True))
    return found


# Per-sample gradients


@KINDS
@NETS
def test_per_sample_gradients(setting: str, kind: Any) -> None:
    objective = make(setting, "cross-entropy")
    expected = torch.stack(
        [
            objective.joined(
                torch.autograd.grad(objective.loss.terms(objective.outputs(x), y).sum(), objective.parameters)
            )
            for x, y in samples(objective, kind, seed=3)
        ]
    )
    for budget in (1 << 20, 8 * objective.size):  # all at once, one at a time
        parts = list(per_sample_gradients(objective, kind, seed=3, budget=budget))
        assert all(part.nbytes <= budget for part in parts)
        torch.testing.assert_close(torch.cat(parts), expected)


@KINDS
@pytest.mark.parametrize("loss", ["cross-entropy", "squared error"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("setting", ["mlp", "attention"])
def test_kept_gradients_are_the_fisher(setting: str, loss: str, reduction: str, kind: Any) -> None:
    objective = make(setting, loss, reduction)
    dense = Fisher(objective=objective, kind=kind, per="sample", seed=5).matrix()
    torch.testing.assert_close(fisher_rank_one_sum(objective, kind, seed=5).matrix(), dense)
    torch.testing.assert_close(fisher_diagonal(objective, kind, seed=5).values, dense.diagonal())
    blocks = fisher_blocks(objective, kind, 7, seed=5).matrix()
    mask = torch.block_diag(*(torch.ones(7, 7) for _ in range(-(-objective.size // 7))))[
        : objective.size, : objective.size
    ]
    torch.testing.assert_close(blocks, dense * mask)


def test_inputs_may_be_dictionaries() -> None:
    plain = make("attention", "cross-entropy")
    data = [({"ids": ids}, targets) for ids, targets in plain.batches()]
    wrapped = Objective.of(plain.model, plain.loss, data, forward=lambda model, inputs: model(inputs["ids"]))
    torch.testing.assert_close(fisher_diagonal(wrapped, "empirical").values, fisher_diagonal(plain, "empirical").values)


class Routed(nn.Module):
    """Samples take one of two layers, by their sign: a path that vmap cannot follow."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.dense = nn.Linear(2, 3), nn.Linear(2, 3), dense

    def forward(self, inputs: Tensor) -> Tensor:
        first = inputs[:, 0] > 0
        if self.dense:
            return torch.where(first[:, None], self.one(inputs), self.two(inputs))
        result = inputs.new_zeros(len(inputs), 3)
        for layer, chosen in ((self.one, first), (self.two, ~first)):
            places = chosen.nonzero().flatten()
            result = result.index_add(0, places, layer(inputs[places]))
        return result


def test_paths_that_depend_on_the_data() -> None:
    data = [(normal(0, 6, 2), torch.tensor([0, 1, 2, 1, 0, 2]))]
    routed, dense = (Objective.of(Routed(kind).double(), CrossEntropy(), data) for kind in (False, True))
    gradients = (torch.cat(list(per_sample_gradients(o, "empirical"))) for o in (routed, dense))
    torch.testing.assert_close(*gradients)
    for kind in (GaussNewton, Hessian):
        torch.testing.assert_close(kind(objective=routed).matrix(), kind(objective=dense).matrix())
    fishers = (Fisher(objective=o, kind="empirical").matrix() for o in (routed, dense))
    torch.testing.assert_close(*fishers)


# Kronecker factors


def brute(objective: Objective, module: nn.Module, kind: str, per: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input factor, output factor and the layer's true block Σ vec(g) vec(g)ᵀ, sample by sample."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    weights: list[Tensor] = []
    for x, y in samples(objective, kind):
        calls: list[tuple[Tensor, Tensor]] = []
        hook = module.register_forward_hook(lambda _, a, o, calls=calls: calls.append((a[0], o)))
        loss = objective.loss.terms(objective.outputs(x), y).sum()
        hook.remove()
        rows: list[tuple[Tensor, Tensor]] = []
        for received, output in calls:
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            received, gradient = received[0], gradient[0]
            if isinstance(module, nn.Conv2d):
                height, width = output.shape[2:]
                kernel = module.kernel_size
                for i in range(height):
                    for j in range(width):
                        patch = received[:, i : i + kernel[0], j : j + kernel[1]]
                        rows.append((patch.flatten(), gradient[:, i, j]))
            else:
                rows += list(
                    zip(received.reshape(-1, received.shape[-1]), gradient.reshape(-1, gradient.shape[-1]), strict=True)
                )
        rows = [(a.detach(), g) for a, g in rows if bool((g != 0).any())]
        if per == "sample" and rows:
            weights.append(sum((torch.outer(g, a) for a, g in rows), torch.zeros(())))
            rows = [(torch.stack([a for a, _ in rows]).mean(0), torch.stack([g for _, g in rows]).sum(0))]
        elif per == "position":
            weights += [torch.outer(g, a) for a, g in rows]
        inputs += [a for a, _ in rows]
        outputs += [g for _, g in rows]
    a, g, w = torch.stack(inputs), torch.stack(outputs), torch.stack(weights).flatten(1)
    return a.T @ a / len(a), g.T @ g * objective.scale, w.T @ w * objective.scale


@KINDS
@PERS
@NETS
def test_factors_and_eigenvalues(setting: str, kind: Any, per: Any) -> None:
    objective = make(setting, "cross-entropy")
    factors = kronecker_factors(objective, kind, per)
    corrected = eigen_kronecker(objective, factors, kind)
    assert factors.keys() == corrected.keys()
    layers = {n for n, m in objective.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(factors) == layers - {"head"}  # whose weight is the embedding's
    for name, layer in factors.items():
        module = objective.model.get_submodule(name)
        input_factor, output_factor, truth = brute(objective, module, kind, per)
        torch.testing.assert_close(layer.kronecker.input_factor, input_factor)
        torch.testing.assert_close(layer.kronecker.output_factor, output_factor)
        torch.testing.assert_close(layer.gram.second_moment, input_factor)
        assert layer.kronecker.per == corrected[name].per == per
        assert (layer.bias is not None) == (getattr(module, "bias", None) is not None)
        # The eigenvalues are the truth's own diagonal in the eigenvectors' basis ...
        vectors = torch.kron(corrected[name].output_vectors, corrected[name].input_vectors)
        expected = (vectors.T @ truth @ vectors).diagonal().view(corrected[name].shape)
        torch.testing.assert_close(corrected[name].eigenvalues, expected, rtol=1e-4, atol=1e-6)
        # ... so that no matrix with these eigenvectors is nearer to it, the Kronecker product included.
        far = (layer.kronecker.matrix() - truth).norm()
        assert (corrected[name].matrix() - truth).norm() <= far * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("setting", ["mlp", "linear"])
def test_one_datum_is_exact(setting: str) -> None:
    several = make(setting, "cross-entropy")
    inputs, targets = next(iter(several.batches()))
    one = Objective.of(several.model, CrossEntropy(), [(inputs[:1], targets[:1])])
    for name, layer in kronecker_factors(one, "sampled").items():
        for kind, curvature in (("weight", layer.kronecker), ("bias", layer.bias)):
            part = Objective.of(one.model, one.loss, one.data, [f"{name}.{kind}"])
            assert curvature is not None
            torch.testing.assert_close(curvature.matrix(), Fisher(objective=part, kind="sampled").matrix())


def test_the_bias_block_is_exact_per_sample() -> None:
    objective = make("conv", "cross-entropy")
    for name, layer in kronecker_factors(objective, "sampled", "sample").items():
        part = Objective.of(objective.model, objective.loss, objective.data, [f"{name}.bias"])
        assert layer.bias is not None
        torch.testing.assert_close(layer.bias.matrix(), Fisher(objective=part, kind="sampled").matrix())


@PERS
def test_padding_counts_in_no_factor(per: Any) -> None:
    plain = make("attention", "cross-entropy")
    ids, targets = everything(plain)
    padded = torch.cat([ids, torch.zeros(5, 4, dtype=torch.long)], dim=1)
    masked = torch.cat([targets, torch.full((5, 4), -100)], dim=1)
    longer = Objective.of(plain.model, plain.loss, [(padded, masked)])
    shorter = Objective.of(plain.model, plain.loss, [(ids, targets)])
    for name, layer in kronecker_factors(longer, "empirical", per).items():
        same = kronecker_factors(shorter, "empirical", per)[name]
        torch.testing.assert_close(layer.kronecker.input_factor, same.kronecker.input_factor)
        torch.testing.assert_close(layer.kronecker.output_factor, same.kronecker.output_factor)
        assert layer.gram.tokens == same.gram.tokens


class Twice(nn.Module):
    """One layer called twice, and outputs changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.layer(self.layer(inputs).add_(1.0).relu())
        return result


@PERS
def test_layers_that_share_a_weight_are_one_layer(per: Any) -> None:
    torch.manual_seed(0)
    once = Twice().double()
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    for layer in (tied[0], tied[2]):
        layer.weight, layer.bias = once.layer.weight, once.layer.bias
    data = [(normal(0, 4, 3), torch.tensor([0, 1, 2, 1]))]
    untied = Objective.of(once, CrossEntropy(), data, forward=lambda m, x: m.layer(m.layer(x).relu()))
    ours, theirs = (
        kronecker_factors(objective, "empirical", per)
        for objective in (Objective.of(tied, CrossEntropy(), data), untied)
    )
    torch.testing.assert_close(ours["0"].kronecker.matrix(), theirs["layer"].kronecker.matrix())


@PERS
def test_a_layer_that_is_called_twice_and_outputs_changed_in_place(per: Any) -> None:
    torch.manual_seed(0)
    model = Twice().double()
    data = [(normal(0, 4, 3), torch.tensor([0, 1, 2, 1]))]
    objective = Objective.of(model, CrossEntropy(), data)
    layer = kronecker_factors(objective, "empirical", per)["layer"]
    rows: list[tuple[Tensor, Tensor]] = []
    moments = []
    for x, y in zip(data[0][0], data[0][1], strict=True):
        first = model.layer(x)
        hidden = (first + 1).relu()
        second = model.layer(hidden)
        g1, g2 = torch.autograd.grad(nn.functional.cross_entropy(second, y), [first, second])
        own = [(a, g) for a, g in ((x, g1), (hidden.detach(), g2)) if bool((g != 0).any())]
        if per == "sample":
            own = [(torch.stack([a for a, _ in own]).mean(0), torch.stack([g for _, g in own]).sum(0))]
        rows += own
    moments = [torch.stack(column) for column in zip(*rows, strict=True)]
    torch.testing.assert_close(layer.kronecker.input_factor, moments[0].T @ moments[0] / len(rows))
    torch.testing.assert_close(layer.kronecker.output_factor, moments[1].T @ moments[1] / 4)


def test_one_dimensional_convolutions_are_two_dimensional_ones_of_height_one() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), nn.Flatten(), nn.Linear(12, 2)).double()
    tall = nn.Sequential(
        nn.Conv2d(2, 3, (1, 3), stride=(1, 2), padding=(0, 1), dilation=(1, 2)), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    state = flat.state_dict()
    tall.load_state_dict({**state, "0.weight": state["0.weight"].unsqueeze(2)})
    inputs, labels = normal(1, 5, 2, 9), torch.tensor([0, 1, 0, 1, 1])
    one = kronecker_factors(Objective.of(flat, CrossEntropy(), [(inputs, labels)]), "empirical")["0"].kronecker
    two = kronecker_factors(Objective.of(tall, CrossEntropy(), [(inputs.unsqueeze(2), labels)]), "empirical")[
        "0"
    ].kronecker
    torch.testing.assert_close(one.input_factor, two.input_factor)
    torch.testing.assert_close(one.output_factor, two.output_factor)


def test_frozen_layers_are_left_out() -> None:
    objective = make("mlp", "cross-entropy")
    objective.model.get_parameter("0.weight").requires_grad_(False)
    again = Objective.of(objective.model, objective.loss, objective.data)
    assert set(kronecker_factors(again)) == {"2"}


# Refusals


def broken(change: Callable[[Objective], None]) -> Objective:
    objective = make("mlp", "cross-entropy")
    with torch.no_grad():
        change(objective)
    return objective


def test_what_is_not_finite_is_named() -> None:
    def overflow(objective: Objective) -> None:
        objective.model.get_parameter("0.weight").fill_(float("inf"))

    with pytest.raises(DataError, match="per-sample gradient holds NaN"):
        list(per_sample_gradients(broken(overflow), "empirical"))
    with pytest.raises(DataError, match=r"of 2 hold NaN or infinity|no position of"):
        kronecker_factors(broken(overflow), "empirical")


def test_options_that_mean_nothing_are_refused() -> None:
    objective = make("mlp", "cross-entropy")
    with pytest.raises(OptionError, match="kind of gradients"):
        list(per_sample_gradients(objective, "exact"))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one gradient takes"):
        list(per_sample_gradients(objective, "empirical", budget=8))
    norms = make("attention", "cross-entropy")
    with pytest.raises(UnsupportedModelError, match="none of the objective's parameters"):
        kronecker_factors(Objective.of(norms.model, norms.loss, norms.data, ["norm.weight"]))
    groups = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten()).double()
    with pytest.raises(UnsupportedModelError, match="0 is a convolution with groups"):
        kronecker_factors(Objective.of(groups, CrossEntropy(), [(normal(0, 1, 2, 1, 1), torch.tensor([0]))]))
    padded = nn.Sequential(nn.Conv2d(2, 2, 1, padding="same"), nn.Flatten()).double()
    with pytest.raises(UnsupportedModelError, match="pads by name"):
        kronecker_factors(Objective.of(padded, CrossEntropy(), [(normal(0, 1, 2, 1, 1), torch.tensor([0]))]))


def test_a_layer_without_influence_is_named() -> None:
    model = Attention().double()
    model.unused = nn.Linear(4, 4).double()
    objective = make("attention", "cross-entropy")
    other = Objective.of(model, objective.loss, objective.data, ["unused.weight", "project.weight"])
    assert set(kronecker_factors(other)) == {"project"}  # never called
