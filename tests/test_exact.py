"""Hessian, Gauss-Newton matrix and Fisher of small networks against dense float64 autograd."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

from helpers import fast_first
from hesse.curvature import CrossEntropy, Curvature, Fisher, GaussNewton, Hessian, Objective, UserLoss
from hesse.errors import DataError, OptionError, UnsupportedProduct
from hesse.testing import CurvatureLaws, normal
from small_nets import LOSSES, SETTINGS, everything, make, mlp


def outputs_of(objective: Objective, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    def outputs(vector: Tensor) -> Tensor:
        parameters = dict(zip(objective.names, objective.split(vector), strict=True))
        result = functional_call(objective.model, parameters, (inputs,))
        assert isinstance(result, Tensor)
        return result

    return outputs


def point(objective: Objective) -> Tensor:
    return objective.join(objective.parameters).detach()


def mean_scale(objective: Objective, targets: Tensor, terms: Tensor) -> float:
    if objective.loss.reduction == "sum":
        return 1.0
    return 1 / float((targets != -100).sum() if isinstance(objective.loss, CrossEntropy) else terms.numel())


def dense_hessian(objective: Objective) -> Tensor:
    inputs, targets = everything(objective)
    outputs = outputs_of(objective, inputs)
    terms = objective.loss.terms(outputs(point(objective)), targets)
    # Reverse over reverse: torch.func.hessian goes forward over reverse, and is wrong through a LayerNorm (torch 2.13).
    second = jacrev(grad(lambda vector: objective.loss.terms(outputs(vector), targets).sum()))(point(objective))
    return second * mean_scale(objective, targets, terms)


def dense_gauss_newton(objective: Objective) -> Tensor:
    inputs, targets = everything(objective)
    outputs, where = outputs_of(objective, inputs), point(objective)
    jacobian = jacrev(outputs)(where).flatten(0, -2)
    value = outputs(where).detach()
    inner = hessian(lambda result: objective.loss.terms(result, targets).sum())(value)
    assert isinstance(inner, Tensor)
    square = inner.reshape(value.numel(), value.numel())
    return jacobian.T @ square @ jacobian * mean_scale(objective, targets, objective.loss.terms(value, targets))


def dense_fisher(objective: Objective, targets: Tensor, per: str) -> Tensor:
    """Σ g gᵀ, one gradient after another by plain autograd."""
    inputs, true_targets = everything(objective)
    outputs = outputs_of(objective, inputs)
    vector = point(objective).requires_grad_()
    terms = objective.loss.terms(outputs(vector), targets)
    losses = terms.flatten() if per == "term" else terms.flatten(1).sum(1) if terms.ndim > 1 else terms
    gradients = torch.stack([torch.autograd.grad(loss, vector, retain_graph=True)[0] for loss in losses])
    return gradients.T @ gradients * mean_scale(objective, true_targets, terms)


def same(curvature: Curvature, expected: Tensor) -> None:
    torch.testing.assert_close(curvature.matrix(), expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max() + 1))


EVERY = pytest.mark.parametrize(("setting", "loss"), list(product(SETTINGS, LOSSES)))
REDUCTIONS = pytest.mark.parametrize("reduction", fast_first(["mean", "sum"]))


@REDUCTIONS
@EVERY
def test_hessian(setting: str, loss: str, reduction: str) -> None:
    objective = make(setting, loss, reduction)
    expected = dense_hessian(objective)
    for keep_graph in (False, True):
        curvature = Hessian(objective=objective, keep_graph=keep_graph)
        for _ in range(2):
            same(curvature, expected)


def test_the_dense_hessian_is_the_slope_of_the_gradient() -> None:
    objective = make("attention", "cross-entropy")
    where, step = point(objective), 1e-5
    inputs, targets = everything(objective)
    outputs = outputs_of(objective, inputs)
    slope = grad(lambda vector: objective.loss.terms(outputs(vector), targets).sum() * objective.scale)
    units = torch.eye(objective.size).double() * step
    differences = torch.stack([(slope(where + unit) - slope(where - unit)) / (2 * step) for unit in units])
    torch.testing.assert_close(dense_hessian(objective), differences, rtol=0, atol=1e-7)


@REDUCTIONS
@EVERY
def test_gauss_newton(setting: str, loss: str, reduction: str) -> None:
    objective = make(setting, loss, reduction)
    same(GaussNewton(objective=objective, columns=5), dense_gauss_newton(objective))


@pytest.mark.parametrize("per", ["sample", "term"])
@REDUCTIONS
@EVERY
def test_empirical_fisher(setting: str, loss: str, reduction: str, per: Any) -> None:
    objective = make(setting, loss, reduction)
    targets = everything(objective)[1]
    same(Fisher(objective=objective, kind="empirical", per=per), dense_fisher(objective, targets, per))


@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_fisher_is_the_expectation_over_all_labels(setting: str) -> None:
    objective = make(setting, "cross-entropy", "sum")
    inputs, targets = everything(objective)
    outputs = outputs_of(objective, inputs)
    vector = point(objective)
    # Terms are independent, so the expectation over each position's labels is enough.
    logs = outputs(vector).log_softmax(-1)
    slopes = jacrev(lambda v: outputs(v).log_softmax(-1))(vector)
    weighted = logs.exp() * (targets != -100).unsqueeze(-1)
    expected = torch.einsum("ncd,nc,nce->de", slopes.flatten(0, -3), weighted.flatten(0, -2), slopes.flatten(0, -3))
    same(Fisher(objective=objective, kind="exact"), expected)
    same(GaussNewton(objective=objective), expected)


@pytest.mark.parametrize("per", ["sample", "term"])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared error"])
@pytest.mark.parametrize("setting", ["mlp", "attention"])
def test_sampled_fisher(setting: str, loss: str, per: Any) -> None:
    objective = make(setting, loss)
    curvature = Fisher(objective=objective, kind="sampled", per=per, seed=3)
    inputs, targets = everything(objective)  # the labels do not depend on how the data is cut into batches
    drawn = objective.loss.sample_targets(objective.outputs(inputs), targets, torch.Generator().manual_seed(3))
    same(curvature, dense_fisher(objective, drawn, per))
    same(curvature, curvature.matrix())  # the same labels for every product


@pytest.mark.parametrize("per", fast_first(["sample", "term"]))
@pytest.mark.parametrize("loss", fast_first(["cross-entropy", "squared error"]))
def test_sampled_fishers_have_the_exact_one_as_their_mean(loss: str, per: Any) -> None:
    objective = make("attention", loss)
    vector = normal(9, objective.size)
    exact = Fisher(objective=objective, kind="exact").quadratic(vector)
    draws = torch.tensor(
        [Fisher(objective=objective, kind="sampled", per=per, seed=100 * s).quadratic(vector) for s in range(200)]
    )
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 200**0.5
    torch.manual_seed(0)
    fresh = Fisher(objective=objective, kind="sampled", per=per, seed=None)
    assert len({fresh.quadratic(vector) for _ in range(5)}) > 1


def test_per_sample_and_per_term_are_different_matrices() -> None:
    objective = make("attention", "cross-entropy")
    kinds = [Fisher(objective=objective, kind="empirical", per=per).matrix() for per in ("sample", "term")]  # type: ignore[arg-type]
    assert not torch.allclose(*kinds, rtol=0.1)


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error", "user"])
@REDUCTIONS
def test_value_and_gradient(loss: str, reduction: str) -> None:
    objective = make("attention", loss, reduction)
    inputs, targets = everything(objective)
    outputs, vector = outputs_of(objective, inputs), point(objective).requires_grad_()
    terms = objective.loss.terms(outputs(vector), targets)
    total = terms.sum() * mean_scale(objective, targets, terms)
    assert objective.value() == pytest.approx(float(total.detach()))
    torch.testing.assert_close(objective.gradient(), torch.autograd.grad(total, vector)[0])


def test_losses_of_torch_are_taken_as_they_are() -> None:
    outputs, labels, targets = normal(0, 5, 3), torch.tensor([0, 1, 2, -100, 1]), normal(1, 5, 3)
    for theirs, wanted in ((nn.CrossEntropyLoss(), labels), (nn.MSELoss(reduction="sum"), targets)):
        model = nn.Identity()
        model.scale = nn.Parameter(torch.ones(()).double())
        objective = Objective.of(model, theirs, [(outputs, wanted)])
        assert objective.value() == pytest.approx(float(theirs(outputs, wanted)))


def test_a_subset_of_the_parameters_is_a_block_of_the_whole() -> None:
    whole = make("attention", "cross-entropy")
    names = ("project.weight", "norm.bias")
    part = Objective.of(whole.model, whole.loss, whole.data, names)
    numbers = torch.arange(whole.size)
    places = dict(zip(whole.names, whole.split(numbers), strict=True))
    chosen = torch.cat([places[name].flatten() for name in names])
    for kind in (Hessian, GaussNewton):
        same(kind(objective=part), kind(objective=whole).matrix()[chosen][:, chosen])


def test_frozen_parameters_are_left_out() -> None:
    objective = make("mlp", "cross-entropy")
    objective.model.get_parameter("0.weight").requires_grad_(False)
    again = Objective.of(objective.model, objective.loss, objective.data)
    assert again.names == ("0.bias", "2.weight", "2.bias")
    same(GaussNewton(objective=again), dense_gauss_newton(again))


def test_a_hessian_of_a_deep_linear_net_is_more_than_its_gauss_newton() -> None:
    objective = make("linear", "squared error")
    assert not torch.allclose(Hessian(objective=objective).matrix(), GaussNewton(objective=objective).matrix())
    only = Objective.of(objective.model, objective.loss, objective.data, ["1.weight", "1.bias"])  # linear in these
    same(Hessian(objective=only), GaussNewton(objective=only).matrix())


class TestHessianLaws(CurvatureLaws):
    offers = ()
    positive = False

    def build(self, dtype: torch.dtype) -> Curvature:
        return Hessian(objective=make("mlp", "cross-entropy", dtype=dtype))

    def dense(self) -> Tensor:
        return dense_hessian(make("mlp", "cross-entropy"))

    test_damping_must_be_a_finite_share = None  # of a mean eigenvalue, which it does not know


class TestGaussNewtonLaws(TestHessianLaws):
    positive = True

    def build(self, dtype: torch.dtype) -> Curvature:
        return GaussNewton(objective=make("attention", "cross-entropy", dtype=dtype))

    def dense(self) -> Tensor:
        return dense_gauss_newton(make("attention", "cross-entropy"))


class TestFisherLaws(TestGaussNewtonLaws):
    def build(self, dtype: torch.dtype) -> Curvature:
        return Fisher(objective=make("attention", "cross-entropy", dtype=dtype), kind="empirical")

    def dense(self) -> Tensor:
        objective = make("attention", "cross-entropy")
        return dense_fisher(objective, everything(objective)[1], "sample")


# Refusals


def test_parameters_must_be_there_and_take_a_gradient() -> None:
    objective = make("mlp", "cross-entropy")
    with pytest.raises(OptionError, match=r"no parameter '3\.weight'; one is called 0\.weight"):
        Objective.of(objective.model, objective.loss, objective.data, ["3.weight"])
    objective.model.requires_grad_(False)
    with pytest.raises(OptionError, match="takes no gradient"):
        Objective.of(objective.model, objective.loss, objective.data, ["0.weight"])
    with pytest.raises(OptionError, match="no parameter takes a gradient"):
        Objective.of(objective.model, objective.loss, objective.data)


class Distances(nn.Module):
    """From points that are learnt: an operation that torch can differentiate once."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(normal(0, 3, 2))

    def forward(self, values: Tensor) -> Tensor:
        return -torch.cdist(values, self.points)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_an_operation_without_second_derivative_is_named(kind: Any) -> None:
    objective = Objective.of(Distances(), CrossEntropy(), [(normal(1, 5, 2), torch.tensor([0, 1, 2, 0, 1]))])
    assert objective.value() > 0
    with pytest.raises(UnsupportedProduct, match="_cdist_backward"):
        kind(objective=objective).matvec(normal(2, objective.size))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 7, 1, 2, 0]), "class 7, but the model gives 3"),
        (torch.tensor([0, -1, 1, 2, 0]), "class -1"),
        (torch.tensor([0.0, 1, 1, 2, 0]), "whole numbers"),
        (torch.tensor([[0], [1], [1], [2], [0]]), r"targets \(5, 1\)"),
    ],
)
def test_targets_that_are_no_classes_are_refused(targets: Tensor, message: str) -> None:
    objective = Objective.of(nn.Linear(2, 3).double(), CrossEntropy(), [(normal(1, 5, 2), targets)])
    with pytest.raises(DataError, match=message):
        objective.value()


def test_losses_must_be_a_mean_or_a_sum_of_terms() -> None:
    model, data = mlp(), [(torch.ones(2, 2), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(OptionError, match="reduction='none'"):
        Objective.of(model, nn.CrossEntropyLoss(reduction="none"), data)
    with pytest.raises(OptionError, match="'mean' or a 'sum'"):
        CrossEntropy(reduction="median")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="label smoothing"):
        Objective.of(model, nn.CrossEntropyLoss(label_smoothing=0.1), data)
    with pytest.raises(OptionError, match="HuberLoss is no loss"):
        Objective.of(model, nn.HuberLoss(), data)
    mean = UserLoss(function=lambda outputs, targets: outputs.mean())
    with pytest.raises(OptionError, match="one term a sample"):
        GaussNewton(objective=Objective.of(model, mean, data)).matvec(torch.ones(21))


def test_there_must_be_data() -> None:
    objective = make("mlp", "cross-entropy")
    with pytest.raises(DataError, match="no batch"):
        Objective.of(objective.model, objective.loss, []).gradient()
    masked = [(inputs, torch.full_like(targets, -100)) for inputs, targets in objective.batches()]
    with pytest.raises(DataError, match="all targets are masked"):
        Objective.of(objective.model, objective.loss, masked).value()

    def once() -> Iterator[Any]:
        yield from objective.data

    with pytest.raises(OptionError, match="only once"):
        Objective.of(objective.model, objective.loss, once())


def test_a_gradient_that_is_not_finite_is_named() -> None:
    objective = make("mlp", "cross-entropy")
    with torch.no_grad():
        objective.model.get_parameter("0.weight").fill_(float("inf"))
    with pytest.raises(DataError, match="gradient holds NaN or infinity"):
        objective.gradient()


def test_a_loss_without_a_distribution_has_no_true_fisher() -> None:
    for kind in ("sampled", "exact"):
        with pytest.raises(UnsupportedProduct, match="no true Fisher"):
            Fisher(objective=make("mlp", "user"), kind=kind)  # type: ignore[arg-type]


def test_fishers_are_of_a_named_kind() -> None:
    with pytest.raises(OptionError, match="kind of a Fisher"):
        Fisher(objective=make("mlp", "cross-entropy"), kind="true")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="per 'sample' or per 'term'"):
        Fisher(objective=make("mlp", "cross-entropy"), kind="exact", per="token")  # type: ignore[arg-type]


def test_models_that_give_no_tensor_need_a_forward() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp().double()

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(inputs)}

    torch.manual_seed(0)
    model, data = Wrapped(), list(make("mlp", "cross-entropy").batches())
    with pytest.raises(OptionError, match="gives dict, not a tensor"):
        Objective.of(model, CrossEntropy(), data).value()
    objective = Objective.of(model, CrossEntropy(), data, forward=lambda m, x: m(x)["logits"])
    plain = Objective.of(model.inner, CrossEntropy(), data)
    for kind in (Hessian, GaussNewton):
        same(kind(objective=objective), kind(objective=plain).matrix())


def test_each_says_which_matrix_it_is() -> None:
    objective = make("mlp", "cross-entropy", "sum")
    curvatures = (
        Hessian(objective=objective),
        GaussNewton(objective=objective).with_damping(0.1),
        Fisher(objective=objective, kind="empirical"),
    )
    assert [str(curvature.origin) for curvature in curvatures] == [
        "Hessian per term in sum loss",
        "Gauss-Newton per term in sum loss",
        "empirical Fisher per sample in sum loss",
    ]


class Resampled:
    """Other samples at each walk."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.generator = inputs, targets, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        some = torch.randperm(len(self.inputs), generator=self.generator)[:2]
        yield self.inputs[some], self.targets[some]


def test_data_may_be_resampled_for_each_product() -> None:
    whole = make("mlp", "squared error")
    inputs, targets = everything(whole)
    some = Objective.of(whole.model, whole.loss, Resampled(inputs, targets))
    curvature, vector = GaussNewton(objective=some), normal(9, whole.size)
    products = torch.stack([curvature.matvec(vector) for _ in range(400)])
    assert not torch.equal(products[0], products[1])
    expected = GaussNewton(objective=whole).matvec(vector)
    error = products.std(0) / 400**0.5
    assert bool(((products.mean(0) - expected).abs() < 5 * error + 1e-9).all())
