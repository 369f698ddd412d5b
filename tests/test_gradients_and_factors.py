"""Per-sample gradients and Kronecker factors of small networks against loops over samples by plain autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hesse.curvature import (
    BlockDiagonal,
    CrossEntropy,
    Diagonal,
    Fisher,
    GaussNewton,
    Gram,
    Hessian,
    Kronecker,
    Objective,
    Origin,
    SquaredError,
    Sum,
)
from hesse.errors import ConditioningError, DataError, OptionError, UnsupportedModelError
from hesse.estimation import eigen_kronecker, estimate_curvatures, per_sample_gradients
from hesse.passes.parts import seen_by
from hesse.testing import normal
from small_nets import Attention, everything, make

NETS = pytest.mark.parametrize("setting", ["mlp", "conv", "attention", "linear"])
KINDS = pytest.mark.parametrize("kind", ["empirical", "sampled"])
LOSSES = pytest.mark.parametrize("loss", ["cross-entropy", "squared error"])
PERS = pytest.mark.parametrize("per", ["position", "sample"])


def samples(objective: Objective, kind: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Each sample as a batch of one, with the labels that estimators use."""
    found = []
    generator = torch.Generator().manual_seed(seed)
    for inputs, targets in objective.batches():
        if kind == "sampled":
            targets = objective.loss.sample_targets(objective.outputs(inputs), targets, generator)
        found += list(zip(inputs.split(1), targets.split(1), strict=True))
    return found


# Per-sample gradients


@KINDS
@NETS
def test_per_sample_gradients(setting: str, kind: Any) -> None:
    objective = make(setting, "cross-entropy")
    expected = torch.stack(
        [
            objective.join(
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
    found = estimate_curvatures(objective, ["fisher", "blocks", "rank-one"], kind, seed=5, block_size=7)
    assert found.rank_one is not None
    torch.testing.assert_close(found.rank_one.matrix(), dense)
    torch.testing.assert_close(torch.cat([d.values.flatten() for d in found.fisher.values()]), dense.diagonal())
    own = [
        torch.block_diag(*torch.ones(-(-p.numel() // 7), 7, 7))[: p.numel(), : p.numel()] for p in objective.parameters
    ]
    blocks = BlockDiagonal(blocks=dict(found.blocks), shapes={n: tuple(p.shape) for n, p in objective.named.items()})
    torch.testing.assert_close(blocks.matrix(), dense * torch.block_diag(*own))
    origins = {c.origin for c in (*found.fisher.values(), *found.blocks.values(), found.rank_one)}
    assert origins == {Origin(f"{kind} Fisher", "sample", f"{reduction} loss")}


def test_inputs_may_be_dictionaries() -> None:
    plain = make("attention", "cross-entropy")
    data = [({"ids": ids}, targets) for ids, targets in plain.batches()]
    wrapped = Objective.of(plain.model, plain.loss, data, forward=lambda model, inputs: model(inputs["ids"]))
    gradients = (torch.cat(list(per_sample_gradients(o, "empirical"))) for o in (wrapped, plain))
    torch.testing.assert_close(*gradients)


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


def contributions(module: nn.Module, received: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each position's input and output gradient of one sample's call, by loops."""
    rows: list[tuple[Tensor, Tensor]] = []
    if isinstance(module, nn.Conv2d):
        kernel = module.kernel_size
        for i in range(gradient.shape[1]):
            for j in range(gradient.shape[2]):
                patch = received[:, i : i + kernel[0], j : j + kernel[1]]
                rows.append((patch.flatten(), gradient[:, i, j]))
    elif isinstance(module, nn.GroupNorm):
        normed = nn.functional.group_norm(received[None], module.num_groups, eps=module.eps)[0]
        rows += [
            (normed[:, i, j], gradient[:, i, j]) for i in range(received.shape[1]) for j in range(received.shape[2])
        ]
    elif isinstance(module, nn.LayerNorm):
        normed = nn.functional.layer_norm(received, module.normalized_shape, eps=module.eps)
        rows += list(zip(normed, gradient, strict=True))
    elif isinstance(module, nn.Embedding):
        one_hot = nn.functional.one_hot(received, module.num_embeddings).to(gradient)
        rows += list(zip(one_hot, gradient, strict=True))
    else:
        flat = received.reshape(-1, received.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        rows += list(zip(*flat, strict=True))
    return [(a.detach(), g) for a, g in rows if bool((g != 0).any())]


def brute(objective: Objective, module: nn.Module, kind: str, per: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean input moment, output moment, and rows (n, out, in) of weight gradients: sample by sample."""
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
            rows += contributions(module, received[0], gradient[0])
        if per == "sample" and rows:
            weights.append(sum((torch.outer(g, a) for a, g in rows), torch.zeros(())))
            rows = [(torch.stack([a for a, _ in rows]).mean(0), torch.stack([g for _, g in rows]).sum(0))]
        elif per == "position":
            weights += [torch.outer(g, a) for a, g in rows]
        inputs += [a for a, _ in rows]
        outputs += [g for _, g in rows]
    a, g = torch.stack(inputs), torch.stack(outputs)
    return a.T @ a / len(a), g.T @ g * objective.scale, torch.stack(weights)


@KINDS
@PERS
@LOSSES
@NETS
def test_factors_and_eigenvalues(setting: str, loss: str, kind: Any, per: Any) -> None:
    objective = make(setting, loss)
    found = estimate_curvatures(objective, ["gram", "kronecker"], kind, per)
    corrected = eigen_kronecker(objective, {n: c for n, c in found.kronecker.items() if isinstance(c, Kronecker)})
    assert tuple(found.kronecker) == objective.names
    assert {c.origin for c in found.kronecker.values()} == {Origin(f"{kind} Fisher", per, "mean loss")}
    for name, curvature in found.kronecker.items():
        module = objective.model.get_submodule(name.rpartition(".")[0])
        input_factor, output_factor, gradients = brute(objective, module, kind, per)
        if name.endswith("bias"):
            assert isinstance(curvature, Gram)
            torch.testing.assert_close(curvature.second_moment, output_factor)
            continue
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            assert isinstance(curvature, Diagonal)
            squares = gradients.diagonal(dim1=1, dim2=2).square().sum(0) * objective.scale
            torch.testing.assert_close(curvature.values, squares)
            continue
        if isinstance(module, nn.Embedding):  # whose weight is the head's too
            assert isinstance(curvature, Sum)
            embedding, head = curvature.terms
            assert isinstance(embedding, Kronecker)
            assert isinstance(head, Kronecker)
            torch.testing.assert_close(embedding.input_factor, input_factor.diagonal())
            torch.testing.assert_close(embedding.output_factor, output_factor)
            assert embedding.transposed
            other = brute(objective, objective.model.get_submodule("head"), kind, per)
            torch.testing.assert_close(head.input_factor, other[0])
            torch.testing.assert_close(head.output_factor, other[1])
            continue
        assert isinstance(curvature, Kronecker)
        torch.testing.assert_close(curvature.input_factor, input_factor)
        torch.testing.assert_close(curvature.output_factor, output_factor)
        torch.testing.assert_close(found.gram[name].second_moment, brute(objective, module, kind, "position")[0])
        assert corrected[name].origin == curvature.origin
        # The eigenvalues are the truth's own diagonal in the eigenvectors' basis ...
        flat = gradients.flatten(1)
        truth, ours = flat.T @ flat * objective.scale, corrected[name]
        assert ours.row_vectors is not None
        assert ours.column_vectors is not None
        vectors = torch.kron(ours.row_vectors, ours.column_vectors)
        torch.testing.assert_close(ours.eigenvalues, (vectors.T @ truth @ vectors).diagonal().view(ours.shape))
        # ... so that no matrix with these eigenvectors is nearer to it, the Kronecker product included.
        far = (curvature.matrix() - truth).norm()
        assert (ours.matrix() - truth).norm() <= far * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("length", [2, 40])
def test_eigenvalues_of_samples_by_either_way(length: int) -> None:
    """Positions are rotated where they are few, each sample's gradient where they are many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, targets = normal(0, 6, length, 3), torch.randint(0, 3, (6, length))
    objective = Objective.of(model, CrossEntropy(), [(inputs, targets)], ["2.weight"])
    kronecker = estimate_curvatures(objective, ["kronecker"], "empirical", "sample").kronecker
    ours = eigen_kronecker(objective, kronecker)["2.weight"]
    truth = Fisher(objective=objective, kind="empirical").matrix()
    assert ours.row_vectors is not None
    assert ours.column_vectors is not None
    vectors = torch.kron(ours.row_vectors, ours.column_vectors)
    torch.testing.assert_close(ours.eigenvalues, (vectors.T @ truth @ vectors).diagonal().view(3, 4))


@KINDS
@PERS
def test_an_embedding_by_itself(kind: Any, per: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4)).double()
    ids = torch.tensor([[0, 1, 1], [2, 4, 2]])
    objective = Objective.of(model, CrossEntropy(), [(ids, torch.tensor([[1, 2, 0], [3, 3, 1]]))], ["0.weight"])
    curvature = estimate_curvatures(objective, ["kronecker"], kind, per).kronecker["0.weight"]
    ours = eigen_kronecker(objective, {"0.weight": curvature})["0.weight"]
    _, _, gradients = brute(objective, model[0], kind, per)
    assert ours.row_vectors is None
    assert ours.column_vectors is not None
    rotated = gradients.transpose(1, 2) @ ours.column_vectors
    torch.testing.assert_close(ours.eigenvalues, rotated.square().sum(0) * objective.scale)
    vector = normal(4, 2, 5, 3)
    for c in (curvature, ours):
        damped = c.with_damping(0.1)
        torch.testing.assert_close(damped.solve(c.matvec(vector) + 0.1 * vector), vector)
        assert c.trace() == pytest.approx(float(c.matrix().trace()))
        torch.testing.assert_close(
            damped.inverse_diagonal(), (c.matrix() + 0.1 * torch.eye(15)).inverse().diagonal().view(5, 3)
        )


def test_one_pass_gives_what_several_give() -> None:
    objective = make("conv", "cross-entropy")
    every = estimate_curvatures(objective, ["gram", "kronecker", "fisher", "blocks", "rank-one"], block_size=4)
    for name in ("gram", "kronecker", "fisher", "blocks"):
        alone = getattr(estimate_curvatures(objective, [name], block_size=4), name)
        for parameter, curvature in getattr(every, name).items():
            torch.testing.assert_close(curvature.matrix(), alone[parameter].matrix())
    assert every.rank_one is not None
    torch.testing.assert_close(every.rank_one.trace(), sum(d.trace() for d in every.fisher.values()))


class Count(nn.Module):
    """Counts its calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.backwards = inner, 0, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += len(inputs)
        outputs: Tensor = self.inner(inputs)
        if outputs.requires_grad:
            outputs.register_hook(self.count)
        return outputs

    def count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def test_each_sample_passes_once_forward_and_once_backward() -> None:
    plain = make("mlp", "cross-entropy")
    model = Count(plain.model)
    objective = Objective.of(model, plain.loss, plain.data)
    estimate_curvatures(objective, ["gram", "kronecker", "fisher", "blocks", "rank-one"], "sampled")
    assert (model.forwards, model.backwards) == (5, 5)


@pytest.mark.parametrize("setting", ["mlp", "conv", "attention"])
def test_the_budget_changes_no_result(setting: str) -> None:
    plain = make(setting, "squared error")
    inputs, targets = everything(plain)
    objective = Objective.of(plain.model, plain.loss, [(inputs, targets)])
    names = ["kronecker", "fisher"]
    wide, narrow = (estimate_curvatures(objective, names, budget=budget) for budget in (1 << 30, 1))
    for name in objective.names:
        torch.testing.assert_close(wide.kronecker[name].matrix(), narrow.kronecker[name].matrix())
        torch.testing.assert_close(wide.fisher[name].values, narrow.fisher[name].values)


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error", "user"])
def test_a_summed_loss_is_its_mean_times_its_terms(loss: str) -> None:
    """Whatever the sizes of the batches, of which the last one is smaller."""
    names: list[Any] = ["kronecker", "fisher", "blocks", "rank-one"]
    mean, total = (
        estimate_curvatures(make("conv", loss, reduction), names, "empirical") for reduction in ("mean", "sum")
    )
    terms = {"cross-entropy": 4, "squared error": 15, "user": 5}[loss]
    assert mean.rank_one is not None
    assert total.rank_one is not None
    assert total.rank_one.trace() == pytest.approx(terms * mean.rank_one.trace())
    for kind in ("kronecker", "fisher", "blocks"):
        for name, curvature in getattr(mean, kind).items():
            assert getattr(total, kind)[name].trace() == pytest.approx(terms * curvature.trace())


def test_samples_norms_are_kept_beside_the_diagonal() -> None:
    objective = make("attention", "cross-entropy")
    found = estimate_curvatures(objective, ["fisher"], "empirical")
    for name, norms in found.squared_norms.items():
        assert norms.shape == (5,)
        assert float(norms.sum()) * objective.scale == pytest.approx(found.fisher[name].trace())


@pytest.mark.parametrize("setting", ["mlp", "linear"])
def test_one_datum_is_exact(setting: str) -> None:
    several = make(setting, "cross-entropy")
    inputs, targets = next(iter(several.batches()))
    one = Objective.of(several.model, CrossEntropy(), [(inputs[:1], targets[:1])])
    found = estimate_curvatures(one, ["kronecker"])
    for name, curvature in found.kronecker.items():
        part = Objective.of(one.model, one.loss, one.data, [name])
        torch.testing.assert_close(curvature.matrix(), Fisher(objective=part, kind="sampled").matrix())


def test_the_bias_block_is_exact_per_sample() -> None:
    objective = make("conv", "cross-entropy")
    for name, curvature in estimate_curvatures(objective, ["kronecker"], "sampled", "sample").kronecker.items():
        if name.endswith("bias"):
            part = Objective.of(objective.model, objective.loss, objective.data, [name])
            torch.testing.assert_close(curvature.matrix(), Fisher(objective=part, kind="sampled").matrix())


def test_deep_linear_network_with_squared_error_is_exact() -> None:
    """Bernacchia et al., 2018: gradients of Gaussian labels do not depend on the inputs, so the blocks are products.

    The expectation over labels is taken with one sample for each direction of the noise: ± each unit vector.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    ).double()
    inputs = normal(8, 6, 3)
    directions = torch.cat([torch.eye(2), -torch.eye(2)]).double()
    repeated = inputs.repeat_interleave(4, 0)
    targets = model(repeated).detach() + directions.repeat(6, 1)
    objective = Objective.of(model, SquaredError(reduction="sum"), [(repeated, targets)])
    plain = Objective.of(model, SquaredError(reduction="sum"), [(inputs, model(inputs).detach())])
    for name, curvature in estimate_curvatures(objective, ["kronecker"], "empirical").kronecker.items():
        part = Objective.of(model, plain.loss, plain.data, [name])
        exact = GaussNewton(objective=part).matrix()
        torch.testing.assert_close(curvature.matrix() / 4, exact)
        torch.testing.assert_close(Hessian(objective=part).matrix(), exact)


class Shared(nn.Module):
    """A deep linear network on each position, whose outputs are one loss's together, or a loss's each."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in ((3, 4), (4, 2))))
        self.pooled = pooled

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs.mean(1) if self.pooled else outputs


@PERS
def test_deep_linear_network_with_shared_weights_is_exact(per: Any) -> None:
    """Eschenhagen et al., 2023: reduce where positions are averaged before the loss, expand where each has its own."""
    pooled = per == "sample"
    model, inputs = Shared(pooled).double(), normal(8, 6, 5, 3)
    outputs = model(inputs).detach()
    plain = Objective.of(model, SquaredError(reduction="sum"), [(inputs, outputs)])
    # The expectation over labels: noise of one position at a time, ± each unit vector.
    places = torch.eye(outputs[0].numel()).view(-1, *outputs.shape[1:]).double()
    noise = torch.cat([places, -places])
    repeated, targets = inputs.repeat_interleave(len(noise), 0), outputs.repeat_interleave(len(noise), 0)
    noisy = Objective.of(
        model, SquaredError(reduction="sum"), [(repeated, targets + noise.repeat(6, *[1] * (noise.ndim - 1)))]
    )
    for name, curvature in estimate_curvatures(noisy, ["kronecker"], "empirical", per).kronecker.items():
        part = Objective.of(model, plain.loss, plain.data, [name])
        torch.testing.assert_close(curvature.matrix() / 4, GaussNewton(objective=part).matrix())


def test_rank_deficient_factors_are_refused_without_damping_and_solved_with() -> None:
    objective = make("mlp", "cross-entropy")
    inputs, targets = next(iter(objective.batches()))
    one = Objective.of(objective.model, CrossEntropy(), [(inputs[:1], targets[:1])])
    curvature = estimate_curvatures(one, ["kronecker"]).kronecker["0.weight"]
    assert curvature.rank() == 1
    vector = normal(3, 3, 2)
    with pytest.raises(ConditioningError, match="damp"):
        curvature.solve(vector)
    damped = curvature.damped(0.01, of="range")
    torch.testing.assert_close(damped.solve(curvature.matvec(vector) + damped.damping * vector), vector)


@PERS
def test_padding_counts_in_no_factor(per: Any) -> None:
    plain = make("attention", "cross-entropy")
    ids, targets = everything(plain)
    padded = torch.cat([ids, torch.zeros(5, 4, dtype=torch.long)], dim=1)
    masked = torch.cat([targets, torch.full((5, 4), -100)], dim=1)
    longer = Objective.of(plain.model, plain.loss, [(padded, masked)])
    shorter = Objective.of(plain.model, plain.loss, [(ids, targets)])
    with_padding, without = (
        estimate_curvatures(o, ["gram", "kronecker", "fisher"], "empirical", per) for o in (longer, shorter)
    )
    for name, curvature in with_padding.kronecker.items():
        torch.testing.assert_close(curvature.matrix(), without.kronecker[name].matrix())
        torch.testing.assert_close(with_padding.fisher[name].values, without.fisher[name].values)
    for name, gram in with_padding.gram.items():
        assert gram.tokens == without.gram[name].tokens
        torch.testing.assert_close(gram.second_moment, without.gram[name].second_moment)


class Projections(nn.Module):
    """Three layers with one input, of which one is masked at some positions."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(3, 2) for _ in range(3))
        self.masked = masked

    def forward(self, inputs: Tensor) -> Tensor:
        mask = (inputs[..., :1] > 0).to(inputs) if self.masked else 1.0
        result: Tensor = self.a(inputs) + self.b(inputs).tanh() + self.c(inputs).sin() * mask
        return result


def test_layers_with_one_input_share_its_moment_while_the_same_positions_count() -> None:
    data = [
        (normal(k, 2, 4, 3).abs() if k == 0 else normal(k, 2, 4, 3), torch.zeros(2, 4, dtype=torch.long))
        for k in range(3)
    ]
    for masked in (False, True):
        objective = Objective.of(Projections(masked).double(), CrossEntropy(), data)
        grams = estimate_curvatures(objective, ["gram"], "empirical").gram
        assert grams["a.weight"].second_moment is grams["b.weight"].second_moment
        assert (grams["a.weight"].second_moment is grams["c.weight"].second_moment) == (not masked)
        rows = torch.cat([x.flatten(0, 1) for x, _ in data])
        torch.testing.assert_close(grams["a.weight"].second_moment, rows.T @ rows / len(rows))
        if masked:
            rows = rows[rows[:, 0] > 0]
        torch.testing.assert_close(grams["c.weight"].second_moment, rows.T @ rows / len(rows))


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
        estimate_curvatures(objective, ["kronecker", "fisher"], "empirical", per)
        for objective in (Objective.of(tied, CrossEntropy(), data), untied)
    )
    for key in ("weight", "bias"):
        torch.testing.assert_close(ours.kronecker[f"0.{key}"].matrix(), theirs.kronecker[f"layer.{key}"].matrix())
        torch.testing.assert_close(ours.fisher[f"0.{key}"].values, theirs.fisher[f"layer.{key}"].values)


@PERS
def test_a_layer_that_is_called_twice_and_outputs_changed_in_place(per: Any) -> None:
    torch.manual_seed(0)
    model = Twice().double()
    data = [(normal(0, 4, 3), torch.tensor([0, 1, 2, 1]))]
    objective = Objective.of(model, CrossEntropy(), data)
    curvature = estimate_curvatures(objective, ["kronecker"], "empirical", per).kronecker["layer.weight"]
    assert isinstance(curvature, Kronecker)
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
    torch.testing.assert_close(curvature.input_factor, moments[0].T @ moments[0] / len(rows))
    torch.testing.assert_close(curvature.output_factor, moments[1].T @ moments[1] / 4)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (2, 4)], ids=str)
def test_patches_are_what_a_convolution_multiplies(mode: str, padding: Any, size: tuple[int, int]) -> None:
    stride = 1 if padding == "same" else 2
    layer = nn.Conv2d(2, 3, size, stride, padding, padding_mode=mode, bias=False, dtype=torch.float64)
    line = nn.Conv1d(2, 3, size[1], stride, padding if isinstance(padding, str) else 2, padding_mode=mode, bias=False)
    for module, inputs in ((layer, normal(0, 2, 2, 5, 6)), (line.double(), normal(1, 2, 2, 6))):
        patches = seen_by(module, inputs)
        made = (patches @ module.weight.flatten(1).T).transpose(1, 2)
        torch.testing.assert_close(made, module(inputs).flatten(2))


def test_one_dimensional_convolutions_are_two_dimensional_ones_of_height_one() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), nn.Flatten(), nn.Linear(12, 2)).double()
    tall = nn.Sequential(
        nn.Conv2d(2, 3, (1, 3), stride=(1, 2), padding=(0, 1), dilation=(1, 2)), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    state = flat.state_dict()
    tall.load_state_dict({**state, "0.weight": state["0.weight"].unsqueeze(2)})
    inputs, labels = normal(1, 5, 2, 9), torch.tensor([0, 1, 0, 1, 1])
    one = estimate_curvatures(
        Objective.of(flat, CrossEntropy(), [(inputs, labels)]), ["kronecker", "fisher"], "empirical"
    )
    wide = [(inputs.unsqueeze(2), labels)]
    two = estimate_curvatures(Objective.of(tall, CrossEntropy(), wide), ["kronecker", "fisher"], "empirical")
    torch.testing.assert_close(one.kronecker["0.weight"].matrix(), two.kronecker["0.weight"].matrix())
    torch.testing.assert_close(one.fisher["0.weight"].values, two.fisher["0.weight"].values.squeeze(2))


def test_frozen_layers_are_left_out() -> None:
    objective = make("mlp", "cross-entropy")
    whole = estimate_curvatures(objective, ["kronecker", "fisher"]).kronecker
    for key in ("weight", "bias"):
        objective.model.get_parameter(f"0.{key}").requires_grad_(False)
    again = Objective.of(objective.model, objective.loss, objective.data)
    found = estimate_curvatures(again, ["kronecker", "fisher"])
    assert set(found.kronecker) == set(found.fisher) == {"2.weight", "2.bias"}
    torch.testing.assert_close(found.kronecker["2.weight"].matrix(), whole["2.weight"].matrix())


class Checkpointed(nn.Module):
    """A network whose activations are computed again on the way back."""

    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = checkpoint(self.inner, inputs.clone().requires_grad_(), use_reentrant=self.use_reentrant)
        return outputs


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = make("conv", "cross-entropy")
    again = Objective.of(Checkpointed(plain.model, False), plain.loss, plain.data)
    names = ["kronecker", "fisher"]
    ours, theirs = (estimate_curvatures(objective, names) for objective in (again, plain))
    for name in plain.names:
        torch.testing.assert_close(ours.kronecker[f"inner.{name}"].matrix(), theirs.kronecker[name].matrix())
        torch.testing.assert_close(ours.fisher[f"inner.{name}"].values, theirs.fisher[name].values)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        estimate_curvatures(Objective.of(Checkpointed(plain.model, True), plain.loss, plain.data), ["kronecker"])


class Unusual(nn.Module):
    """Parameters that hooks do not see: one of the module's own, and a layer's weight used without its call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(3))
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.linear(inputs, self.layer.weight.tanh(), self.layer.bias) + self.token
        result: Tensor = self.last(hidden.sin() + self.layer(inputs))
        return result


def test_parameters_that_no_layer_shows_are_taken_by_autograd() -> None:
    model = Unusual().double()
    objective = Objective.of(model, CrossEntropy(), [(normal(0, 4, 3), torch.tensor([0, 1, 1, 0]))])
    dense = Fisher(objective=objective, kind="sampled").matrix()
    found = estimate_curvatures(objective, ["fisher", "rank-one"])
    assert found.rank_one is not None
    torch.testing.assert_close(found.rank_one.matrix(), dense)
    torch.testing.assert_close(torch.cat([d.values.flatten() for d in found.fisher.values()]), dense.diagonal())
    with pytest.raises(UnsupportedModelError, match=r"layer.weight is no matrix"):
        estimate_curvatures(objective, ["gram"])
    known = [name for name in objective.names if not name.startswith("layer.")]
    without = Objective.of(model, CrossEntropy(), objective.data, known)
    with pytest.raises(UnsupportedModelError, match=r"token is no matrix"):
        estimate_curvatures(without, ["kronecker"], per="position")
    curvature = estimate_curvatures(without, ["kronecker"], per="sample").kronecker["token"]
    part = Objective.of(model, CrossEntropy(), objective.data, ["token"])
    torch.testing.assert_close(curvature.diagonal(), Fisher(objective=part, kind="sampled").matrix().diagonal())


class Experts(nn.Module):
    """Tokens go to one of two layers, and so reach them as rows that belong to no sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)
        self.experts = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        mixed = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            places = (ids % 2 == index).nonzero(as_tuple=True)
            mixed = mixed.index_put(places, expert(hidden[places]))
        result: Tensor = self.head(hidden + mixed.sin())
        return result


def test_rows_of_experts_are_told_apart_by_sample() -> None:
    ids = torch.tensor([[0, 1, 2], [1, 1, 3], [2, 0, 2], [3, 2, 1]])
    objective = Objective.of(Experts().double(), CrossEntropy(), [(ids, ids.flip(1))])
    dense = Fisher(objective=objective, kind="sampled").matrix()
    found = estimate_curvatures(objective, ["fisher", "kronecker"], per="sample")
    torch.testing.assert_close(torch.cat([d.values.flatten() for d in found.fisher.values()]), dense.diagonal())
    for index, expert in enumerate(objective.model.experts):
        outputs: list[Tensor] = []
        hook = expert.register_forward_hook(lambda _, a, o, found=outputs: found.append(o))
        loss = objective.loss.terms(objective.model(ids), ids.flip(1)).sum()
        hook.remove()
        (gradient,) = torch.autograd.grad(loss, outputs[0])
        ours = estimate_curvatures(objective, ["kronecker"], "empirical").kronecker[f"experts.{index}.weight"]
        assert isinstance(ours, Kronecker)
        torch.testing.assert_close(ours.output_factor, gradient.T @ gradient * objective.scale)


# Refusals


def broken(change: Callable[[Objective], None]) -> Objective:
    objective = make("mlp", "cross-entropy")
    with torch.no_grad():
        change(objective)
    return objective


def test_what_is_not_finite_is_named() -> None:
    def overflow(objective: Objective) -> None:
        objective.model.get_parameter("0.weight").fill_(float("inf"))

    with pytest.raises(DataError, match="outputs hold NaN"):
        list(per_sample_gradients(broken(overflow), "empirical"))
    with pytest.raises(DataError, match="outputs hold NaN"):
        estimate_curvatures(broken(overflow), ["kronecker"])


def test_options_that_mean_nothing_are_refused() -> None:
    objective = make("mlp", "cross-entropy")
    with pytest.raises(OptionError, match="kind of gradients"):
        list(per_sample_gradients(objective, "exact"))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one gradient takes"):
        list(per_sample_gradients(objective, "empirical", budget=8))
    with pytest.raises(OptionError, match="'hessian' is not a curvature estimated from data: use gram"):
        estimate_curvatures(objective, ["hessian"])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="per 'position' or per 'sample'"):
        estimate_curvatures(objective, ["gram"], per="token")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="of one origin"):
        eigen_kronecker(objective, {"0.weight": Kronecker(output_factor=torch.eye(3), input_factor=torch.eye(2))})
    groups = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten()).double()
    with pytest.raises(UnsupportedModelError, match="0 is a convolution with groups"):
        estimate_curvatures(
            Objective.of(groups, CrossEntropy(), [(normal(0, 1, 2, 1, 1), torch.tensor([0]))]), ["gram"]
        )
    batch = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    with pytest.raises(UnsupportedModelError, match=r"1 takes statistics over a batch.*model.eval\(\)"):
        list(
            per_sample_gradients(
                Objective.of(batch, CrossEntropy(), [(normal(0, 2, 2), torch.tensor([0, 1]))]), "empirical"
            )
        )


def test_statistics_of_a_batch_that_are_fixed_are_a_scale() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten()).double()
    model(normal(0, 8, 1, 3, 3))
    model.eval()
    objective = Objective.of(model, CrossEntropy(), [(normal(1, 4, 1, 3, 3), torch.tensor([0, 3, 5, 7]))])
    found = estimate_curvatures(objective, ["fisher"])
    dense = Fisher(objective=objective, kind="sampled").matrix().diagonal()
    torch.testing.assert_close(torch.cat([d.values.flatten() for d in found.fisher.values()]), dense)


def test_a_layer_without_influence_is_named() -> None:
    model = Attention().double()
    model.unused = nn.Linear(4, 4).double()
    objective = make("attention", "cross-entropy")
    other = Objective.of(model, objective.loss, objective.data, ["unused.weight", "project.weight"])
    with pytest.raises(DataError, match="no position of unused has a gradient"):
        estimate_curvatures(other, ["kronecker"])
    assert not bool(estimate_curvatures(other, ["fisher"]).fisher["unused.weight"].values.any())
