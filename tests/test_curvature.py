"""Every product of every curvature against a dense matrix: cases × products × precisions."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.curvature import Curvature, Diagonal, Gram, Identity, Kronecker
from hesse.errors import ConditioningError, DataError, OptionError, UnsupportedProduct

OUT, IN, TOKENS = 3, 4, 20
SIZE = OUT * IN
EYE = torch.eye(SIZE, dtype=torch.float64)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
laws = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = normal(0, TOKENS, IN) * torch.tensor([1.0, 0.2, 3.0, 1.0]).double()
OUTPUT_MOMENT = normal(1, 30, OUT).T @ normal(1, 30, OUT) / 30
OUTPUT_VALUES = OUTPUT_MOMENT.diagonal()


def hessian(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The second derivative of `loss` of a weight (out, in) as a matrix over row-major weights, by autograd."""
    blocks = torch.autograd.functional.hessian(loss, normal(2, OUT, IN))
    assert isinstance(blocks, Tensor)
    return blocks.reshape(SIZE, SIZE)


def layer_loss(weight: Tensor, inputs: Tensor = INPUTS) -> Tensor:
    """½ mean over tokens of ‖W x - W₀ x‖²."""
    difference = inputs @ (weight - normal(3, OUT, IN)).T
    return difference.square().sum(1).mean() / 2


def output_weighted_loss(weight: Tensor, output_moment: Tensor) -> Tensor:
    """½ mean over tokens of yᵀ G y with y = W x - W₀ x: the Gauss-Newton matrix is exact, and is G ⊗ E[xxᵀ]."""
    difference = INPUTS @ (weight - normal(3, OUT, IN)).T
    return ((difference @ output_moment) * difference).sum(1).mean() / 2


@dataclass(frozen=True)
class Case:
    """A curvature in a given precision, and the matrix (out · in, out · in) that it stands for."""

    build: Callable[[torch.dtype], Curvature]
    dense: Tensor


def moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


FULL_VALUES, ROW_VALUES = normal(4, OUT, IN).abs() + 0.1, normal(5, IN).abs() + 0.1
CASES = {
    "identity": Case(lambda dtype: Identity(), EYE),
    "diagonal": Case(lambda dtype: Diagonal(values=FULL_VALUES.to(dtype)), FULL_VALUES.flatten().diag()),
    "diagonal-shared-by-rows": Case(
        lambda dtype: Diagonal(values=ROW_VALUES.to(dtype)), ROW_VALUES.expand(OUT, IN).flatten().diag()
    ),
    "gram": Case(lambda dtype: Gram.from_inputs(INPUTS.to(dtype)), hessian(layer_loss)),
    "kronecker": Case(
        lambda dtype: Kronecker(output_factor=OUTPUT_MOMENT.to(dtype), input_factor=moment(INPUTS).to(dtype)),
        hessian(lambda weight: output_weighted_loss(weight, OUTPUT_MOMENT)),
    ),
    "kronecker-diagonal-output": Case(
        lambda dtype: Kronecker(
            output_factor=OUTPUT_MOMENT.diagonal().to(dtype), input_factor=moment(INPUTS).to(dtype)
        ),
        hessian(lambda weight: output_weighted_loss(weight, OUTPUT_MOMENT.diagonal().diag())),
    ),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def flat(tensor: Tensor) -> Tensor:
    """(..., out, in) as (..., out · in), in float64."""
    return tensor.double().reshape(*tensor.shape[:-2], SIZE)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal to a relative error of the largest entry."""
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}\n{actual}\n{expected}"


def repeats(curvature: Curvature) -> int:
    """How often the curvature's own shape stands side by side in a weight (out, in)."""
    return SIZE // curvature.shape.numel()


# Products


@PRECISIONS
@EVERY_CASE
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)], ids=str)
def test_matvec(case: Case, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    vectors = normal(6, *batch, OUT, IN)
    product = case.build(dtype).matvec(vectors.to(dtype))
    assert product.shape == vectors.shape
    assert product.dtype == dtype
    check(flat(product), flat(vectors) @ case.dense, dtype)


@PRECISIONS
@EVERY_CASE
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_solve(case: Case, dtype: torch.dtype, batch: tuple[int, ...], damping: float) -> None:
    vectors = normal(7, *batch, OUT, IN)
    curvature = case.build(dtype).damped(damping)
    solved = curvature.solve(vectors.to(dtype))
    assert solved.shape == vectors.shape
    assert solved.dtype == dtype
    damped = case.dense + curvature.damping * EYE
    check(flat(solved), flat(vectors) @ torch.linalg.inv(damped), dtype)


@PRECISIONS
@EVERY_CASE
def test_quadratic_sums_over_leading_dimensions(case: Case, dtype: torch.dtype) -> None:
    changes = normal(8, 5, OUT, IN)
    expected = 0.5 * torch.einsum("bi,ij,bj->", flat(changes), case.dense, flat(changes))
    assert case.build(dtype).quadratic(changes.to(dtype)) == pytest.approx(float(expected), rel=TOLERANCE[dtype])


@PRECISIONS
@EVERY_CASE
def test_diagonal(case: Case, dtype: torch.dtype) -> None:
    curvature = case.build(dtype)
    assert curvature.diagonal().shape == curvature.shape
    check(curvature.diagonal().expand(OUT, IN).flatten(), case.dense.diagonal(), dtype)


@PRECISIONS
@EVERY_CASE
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_inverse_diagonal(case: Case, dtype: torch.dtype, damping: float) -> None:
    curvature = case.build(dtype).damped(damping)
    assert curvature.inverse_diagonal().shape == curvature.shape
    inverse = torch.linalg.inv(case.dense + curvature.damping * EYE)
    # The Identity has no dtype of its own and answers in float32.
    precision = torch.float32 if isinstance(curvature, Identity) else dtype
    check(curvature.inverse_diagonal().expand(OUT, IN).flatten(), inverse.diagonal(), precision)


@PRECISIONS
@EVERY_CASE
def test_trace(case: Case, dtype: torch.dtype) -> None:
    curvature = case.build(dtype)
    trace = curvature.trace() * repeats(curvature)
    assert trace == pytest.approx(float(case.dense.trace()), rel=TOLERANCE[dtype])


@PRECISIONS
@EVERY_CASE
def test_rank(case: Case, dtype: torch.dtype) -> None:
    curvature = case.build(dtype)
    assert curvature.rank() * repeats(curvature) == int(torch.linalg.matrix_rank(case.dense))


def test_products_follow_the_vector_not_the_curvature_in_precision() -> None:
    gram = Gram.from_inputs(INPUTS)
    vector = normal(9, OUT, IN).float()
    assert gram.matvec(vector).dtype == torch.float32
    assert gram.solve(vector).dtype == torch.float32


# Damping


@EVERY_CASE
@pytest.mark.parametrize("amount", [0.0, 0.01, 2.0])
def test_damping_of_the_space_is_a_share_of_the_mean_eigenvalue(case: Case, amount: float) -> None:
    eigenvalues = torch.linalg.eigvalsh(case.dense)
    assert case.build(torch.float64).damped(amount).damping == pytest.approx(amount * float(eigenvalues.mean()))


DEFICIENT = normal(10, 2, IN)  # 2 tokens in 4 dimensions
DEFICIENT_CASES = {
    "diagonal": Case(
        lambda dtype: Diagonal(values=torch.tensor([2.0, 0.0, 1.0, 0.0], dtype=dtype)),
        torch.tensor([2.0, 0.0, 1.0, 0.0]).double().repeat(OUT).diag(),
    ),
    "gram": Case(
        lambda dtype: Gram.from_inputs(DEFICIENT.to(dtype)), hessian(lambda weight: layer_loss(weight, DEFICIENT))
    ),
    "kronecker": Case(
        lambda dtype: Kronecker(output_factor=OUTPUT_MOMENT.to(dtype), input_factor=moment(DEFICIENT).to(dtype)),
        torch.kron(OUTPUT_MOMENT, moment(DEFICIENT)),
    ),
    "kronecker-diagonal-output": Case(
        lambda dtype: Kronecker(
            output_factor=torch.tensor([1.0, 0.0, 2.0], dtype=dtype), input_factor=moment(INPUTS).to(dtype)
        ),
        torch.kron(torch.tensor([1.0, 0.0, 2.0]).double().diag(), moment(INPUTS)),
    ),
}


@PRECISIONS
@pytest.mark.parametrize("case", DEFICIENT_CASES.values(), ids=DEFICIENT_CASES.keys())
def test_damping_of_the_range_is_a_share_of_the_mean_positive_eigenvalue(case: Case, dtype: torch.dtype) -> None:
    eigenvalues = torch.linalg.eigvalsh(case.dense)
    positive = eigenvalues[eigenvalues > 1e-10]
    assert len(positive) < SIZE
    of_range = case.build(dtype).damped(0.1, of="range").damping
    assert of_range == pytest.approx(0.1 * float(positive.mean()), rel=1e-5)
    assert case.build(dtype).damped(0.1, of="space").damping < of_range


@EVERY_CASE
def test_only_inverses_see_the_damping(case: Case) -> None:
    plain, damped = case.build(torch.float64), case.build(torch.float64).damped(0.5)
    vector = normal(11, OUT, IN)
    assert plain.quadratic(vector) == damped.quadratic(vector)
    assert torch.equal(plain.matvec(vector), damped.matvec(vector))
    assert torch.equal(plain.diagonal(), damped.diagonal())
    assert plain.trace() == damped.trace()
    assert not torch.allclose(plain.solve(vector), damped.solve(vector))


def test_damping_is_set_not_added() -> None:
    gram = Gram.from_inputs(INPUTS)
    assert gram.damped(0.5).damped(0.1).damping == gram.damped(0.1).damping


# Laws


def drawn(kind: str, seed: int) -> Curvature:
    """A random curvature of a kind, positive definite."""
    left, right = normal(seed, 9, OUT), normal(seed + 1, 9, IN)
    return {
        "identity": lambda: Identity(),
        "diagonal": lambda: Diagonal(values=normal(seed, OUT, IN).square()),
        "gram": lambda: Gram.from_inputs(right),
        "kronecker": lambda: Kronecker(output_factor=moment(left), input_factor=moment(right)),
        "kronecker-diagonal-output": lambda: Kronecker(
            output_factor=moment(left).diagonal(), input_factor=moment(right)
        ),
    }[kind]()


EVERY_KIND = pytest.mark.parametrize("kind", ["identity", "diagonal", "gram", "kronecker", "kronecker-diagonal-output"])


@EVERY_KIND
@laws
@given(seed=seeds)
def test_law_symmetric(kind: str, seed: int) -> None:
    curvature, left, right = drawn(kind, seed), normal(seed + 2, OUT, IN), normal(seed + 3, OUT, IN)
    forth, back = (left * curvature.matvec(right)).sum(), (right * curvature.matvec(left)).sum()
    torch.testing.assert_close(forth, back)


@EVERY_KIND
@laws
@given(seed=seeds, factor=st.floats(-10, 10))
def test_law_linear(kind: str, seed: int, factor: float) -> None:
    curvature, left, right = drawn(kind, seed), normal(seed + 2, OUT, IN), normal(seed + 3, OUT, IN)
    expected = curvature.matvec(left) + factor * curvature.matvec(right)
    torch.testing.assert_close(curvature.matvec(left + factor * right), expected)


@EVERY_KIND
@laws
@given(seed=seeds, size=st.floats(0, 1e3))
def test_law_quadratic_is_half_the_inner_product_and_not_negative(kind: str, seed: int, size: float) -> None:
    curvature, change = drawn(kind, seed), size * normal(seed + 2, OUT, IN)
    quadratic = curvature.quadratic(change)
    assert quadratic >= 0
    assert quadratic == pytest.approx(0.5 * float((change * curvature.matvec(change)).sum()))


@EVERY_KIND
@laws
@given(seed=seeds, amount=st.floats(1e-4, 1e2))
def test_law_solve_inverts_the_damped_product(kind: str, seed: int, amount: float) -> None:
    curvature, vector = drawn(kind, seed).damped(amount), normal(seed + 2, OUT, IN)
    there_and_back = curvature.solve(curvature.matvec(vector) + curvature.damping * vector)
    torch.testing.assert_close(there_and_back, vector, rtol=1e-8, atol=1e-8)


@EVERY_KIND
@laws
@given(seed=seeds)
def test_law_leading_dimensions_are_independent(kind: str, seed: int) -> None:
    curvature, vectors = drawn(kind, seed).damped(0.1), normal(seed + 2, 3, OUT, IN)
    for product in (curvature.matvec, curvature.solve):
        torch.testing.assert_close(product(vectors), torch.stack([product(vector) for vector in vectors]))


# Exactness by name


def test_gram_quadratic_is_the_layer_loss() -> None:
    weight = normal(12, OUT, IN)
    assert Gram.from_inputs(INPUTS).quadratic(weight - normal(3, OUT, IN)) == pytest.approx(float(layer_loss(weight)))


def test_gram_is_kronecker_with_the_identity() -> None:
    gram = Gram.from_inputs(INPUTS)
    kronecker = Kronecker(output_factor=torch.eye(OUT).double(), input_factor=gram.second_moment, damping=0.2)
    vector = normal(13, OUT, IN)
    torch.testing.assert_close(gram.matvec(vector), kronecker.matvec(vector))
    torch.testing.assert_close(Gram.from_inputs(INPUTS).damped(0.0).solve(vector), gram.solve(vector))
    damped = Gram(second_moment=gram.second_moment, tokens=TOKENS, damping=0.2)
    torch.testing.assert_close(damped.solve(vector), kronecker.solve(vector))


def test_gram_of_leading_dimensions_is_the_gram_of_all_tokens() -> None:
    batched = Gram.from_inputs(INPUTS.reshape(4, 5, IN))
    assert batched.tokens == TOKENS
    torch.testing.assert_close(batched.second_moment, moment(INPUTS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_accumulates_in_float32(dtype: torch.dtype) -> None:
    # 4096 equal tokens: a sum kept in bfloat16 or float16 would stop growing, or overflow, far below the true one.
    gram = Gram.from_inputs(torch.full((4096, 2), 8.0, dtype=dtype))
    assert gram.second_moment.dtype == torch.float32
    torch.testing.assert_close(gram.second_moment, torch.full((2, 2), 64.0))


def test_diagonal_part_of_a_gram() -> None:
    part = Gram.from_inputs(INPUTS).damped(0.1).diagonal_part()
    torch.testing.assert_close(part.values, INPUTS.square().mean(0))
    assert part.damping == Gram.from_inputs(INPUTS).damped(0.1).damping


# Refusals


class MatvecOnly(Curvature):
    """A curvature with nothing but what every curvature must have."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((2,))

    def matvec(self, vector: Tensor) -> Tensor:
        return vector

    def diagonal(self) -> Tensor:
        return torch.ones(2)


def test_missing_products_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedProduct, match="MatvecOnly has no inverse product"):
        MatvecOnly().solve(torch.ones(2))
    with pytest.raises(UnsupportedProduct, match="MatvecOnly has no inverse diagonal"):
        MatvecOnly().inverse_diagonal()


@pytest.mark.parametrize("amount", [-0.01, float("nan"), float("inf")])
def test_damping_must_be_a_finite_share(amount: float) -> None:
    with pytest.raises(OptionError, match="damping is"):
        Gram.from_inputs(INPUTS).damped(amount)


@PRECISIONS
@pytest.mark.parametrize("case", DEFICIENT_CASES.values(), ids=DEFICIENT_CASES.keys())
def test_a_singular_curvature_has_no_undamped_inverse(case: Case, dtype: torch.dtype) -> None:
    curvature = case.build(dtype)
    with pytest.raises(ConditioningError, match="damping"):
        curvature.solve(normal(14, OUT, IN).to(dtype))
    with pytest.raises(ConditioningError, match="damping"):
        curvature.inverse_diagonal()
    assert bool(torch.isfinite(curvature.damped(0.01).solve(normal(14, OUT, IN).to(dtype))).all())


@settings(max_examples=40, deadline=None)
@given(seed=seeds, width=st.sampled_from([3, 8, 40]))
@example(seed=1494, width=3)  # the least that rounding was seen to leave of 20,000 cases
def test_one_token_too_few_is_singular_however_the_rounding_falls(seed: int, width: int) -> None:
    gram = Gram.from_inputs(normal(seed, width - 1, width).float())
    with pytest.raises(ConditioningError, match=f"{width - 1} tokens in {width} dimensions is singular"):
        gram.solve(torch.ones(width))
    kronecker = Kronecker(output_factor=torch.ones(2), input_factor=gram.second_moment)
    with pytest.raises(ConditioningError, match="singular"):
        kronecker.solve(torch.ones(2, width))


def test_scales_of_inputs_alone_do_not_make_a_gram_singular() -> None:
    gram = Gram.from_inputs(normal(15, 40, IN) * torch.tensor([1e-4, 1.0, 1e3, 1.0]).double())
    vector = normal(16, IN)
    torch.testing.assert_close(gram.matvec(gram.solve(vector)), vector)


def test_a_gram_needs_finite_tokens() -> None:
    with pytest.raises(DataError, match="at least one token"):
        Gram.from_inputs(torch.empty(0, IN))
    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="NaN or infinity"):
            Gram.from_inputs(torch.full((2, IN), value))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_diagonal_needs_finite_entries_that_are_not_negative(value: float) -> None:
    with pytest.raises(ConditioningError, match="not negative"):
        Diagonal(values=torch.tensor([1.0, value]))


@pytest.mark.parametrize(("output", "inputs"), [((2, 2, 2), (3, 3)), ((2, 2), (3,)), ((), (3, 3))], ids=str)
def test_kronecker_factors_are_matrices(output: tuple[int, ...], inputs: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="output factor"):
        Kronecker(output_factor=torch.ones(output), input_factor=torch.ones(inputs))
