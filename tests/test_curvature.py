"""The curvatures of single layers: every product and law, and what must be exact by name."""

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.curvature import (
    BlockDiagonal,
    Curvature,
    Diagonal,
    EigenKronecker,
    Gram,
    Identity,
    Kronecker,
    Origin,
    RankOneSum,
    Scaled,
    Sum,
)
from hesse.errors import ConditioningError, ConditioningWarning, DataError, OptionError, UnsupportedProduct
from hesse.testing import CurvatureLaws, normal, seeds

OUT, IN, TOKENS = 3, 4, 20
SIZE = OUT * IN
INPUTS = normal(0, TOKENS, IN) * torch.tensor([1.0, 0.2, 3.0, 1.0]).double()
OUTPUT_MOMENT = normal(1, 30, OUT).T @ normal(1, 30, OUT) / 30
FULL_VALUES, ROW_VALUES = normal(4, OUT, IN).abs() + 0.1, normal(5, IN).abs() + 0.1


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


def moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


class OfOneLayer(CurvatureLaws):
    """A curvature of a weight (OUT, IN)."""

    def weight(self) -> tuple[int, ...]:
        return (OUT, IN)


class TestIdentity(OfOneLayer):
    precise_to = MappingProxyType(
        {torch.float64: 1e-6, torch.float32: 1e-6}
    )  # it has no precision of its own, and answers in float32

    def build(self, dtype: torch.dtype) -> Curvature:
        return Identity()

    def dense(self) -> Tensor:
        return torch.eye(SIZE).double()


class TestDiagonal(OfOneLayer):
    def build(self, dtype: torch.dtype) -> Curvature:
        return Diagonal(values=FULL_VALUES.to(dtype))

    def dense(self) -> Tensor:
        return FULL_VALUES.flatten().diag()


class TestDiagonalSharedByRows(OfOneLayer):
    def build(self, dtype: torch.dtype) -> Curvature:
        return Diagonal(values=ROW_VALUES.to(dtype))

    def dense(self) -> Tensor:
        return ROW_VALUES.expand(OUT, IN).flatten().diag()


class TestDiagonalWithZeros(OfOneLayer):
    VALUES = torch.tensor([2.0, 0.0, 1.0, 0.0]).double()

    def build(self, dtype: torch.dtype) -> Curvature:
        return Diagonal(values=self.VALUES.to(dtype))

    def dense(self) -> Tensor:
        return self.VALUES.repeat(OUT).diag()


class TestGram(OfOneLayer):
    inputs = INPUTS

    def build(self, dtype: torch.dtype) -> Curvature:
        return Gram.from_inputs(self.inputs.to(dtype))

    def dense(self) -> Tensor:
        return hessian(lambda weight: layer_loss(weight, self.inputs))


class TestGramOfTwoStreams(TestGram):
    """The cross moment is saved and loaded with it, and changes no product."""

    def build(self, dtype: torch.dtype) -> Curvature:
        return Gram.from_inputs(self.inputs.to(dtype), normal(43, *self.inputs.shape).to(dtype))


class TestGramOfTooFewTokens(TestGram):
    inputs = normal(10, 2, IN)


class TestKronecker(OfOneLayer):
    left, inputs = OUTPUT_MOMENT, INPUTS

    def build(self, dtype: torch.dtype) -> Curvature:
        return Kronecker(output_factor=self.left.to(dtype), input_factor=moment(self.inputs).to(dtype))

    def dense(self) -> Tensor:
        return torch.kron(self.left, moment(self.inputs))

    def test_is_the_curvature_of_the_loss_by_name(self) -> None:
        torch.testing.assert_close(
            torch.kron(OUTPUT_MOMENT, moment(INPUTS)), hessian(lambda w: output_weighted_loss(w, OUTPUT_MOMENT))
        )


class TestKroneckerOfTooFewTokens(TestKronecker):
    inputs = normal(10, 2, IN)


class TestKroneckerDiagonalOutput(OfOneLayer):
    left = OUTPUT_MOMENT.diagonal()

    def build(self, dtype: torch.dtype) -> Curvature:
        return Kronecker(output_factor=self.left.to(dtype), input_factor=moment(INPUTS).to(dtype))

    def dense(self) -> Tensor:
        return torch.kron(self.left.diag(), moment(INPUTS))


class TestKroneckerSingularOutput(TestKroneckerDiagonalOutput):
    left = torch.tensor([1.0, 0.0, 2.0]).double()


class TestKroneckerDiagonalInput(OfOneLayer):
    """As of an embedding by itself."""

    right = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.1, 0.7][:IN]).double()

    def build(self, dtype: torch.dtype) -> Curvature:
        return Kronecker(output_factor=OUTPUT_MOMENT.to(dtype), input_factor=self.right.to(dtype))

    def dense(self) -> Tensor:
        return torch.kron(OUTPUT_MOMENT, self.right.diag())


class TestKroneckerTransposed(CurvatureLaws):
    def build(self, dtype: torch.dtype) -> Curvature:
        return Kronecker(output_factor=OUTPUT_MOMENT.to(dtype), input_factor=moment(INPUTS).to(dtype), transposed=True)

    def dense(self) -> Tensor:
        return torch.kron(moment(INPUTS), OUTPUT_MOMENT)


class TestEigenKronecker(OfOneLayer):
    VECTORS = torch.linalg.qr(normal(30, OUT, OUT)).Q, torch.linalg.qr(normal(31, IN, IN)).Q
    values = FULL_VALUES

    def build(self, dtype: torch.dtype) -> Curvature:
        left, right = (vectors.to(dtype) for vectors in self.VECTORS)
        return EigenKronecker(row_vectors=left, column_vectors=right, eigenvalues=self.values.to(dtype))

    def dense(self) -> Tensor:
        vectors = torch.kron(*self.VECTORS)
        return vectors @ self.values.flatten().diag() @ vectors.T


class TestEigenKroneckerSingular(TestEigenKronecker):
    values = FULL_VALUES * (FULL_VALUES.median() < FULL_VALUES)


class TestScaled(TestGram):
    def build(self, dtype: torch.dtype) -> Curvature:
        return Scaled(original=super().build(dtype), factor=2.5)

    def dense(self) -> Tensor:
        return 2.5 * super().dense()


class TestSum(OfOneLayer):
    offers = ("diagonal", "trace", "rank", "save")

    def build(self, dtype: torch.dtype) -> Curvature:
        kronecker = Kronecker(output_factor=OUTPUT_MOMENT.to(dtype), input_factor=moment(INPUTS).to(dtype))
        return Sum(terms=(kronecker, Diagonal(values=FULL_VALUES.to(dtype))))

    def dense(self) -> Tensor:
        return torch.kron(OUTPUT_MOMENT, moment(INPUTS)) + FULL_VALUES.flatten().diag()


class TestBlockDiagonal(CurvatureLaws):
    offers = ("solve", "inverse_diagonal", "diagonal", "trace", "rank", "save")  # a RankOneSum has no powers

    def build(self, dtype: torch.dtype) -> Curvature:
        blocks = {
            "a.weight": Gram.from_inputs(INPUTS.to(dtype)),
            "a.bias": Diagonal(values=ROW_VALUES[:OUT].to(dtype)),
            "b.weight": RankOneSum.from_gradients(normal(32, 9, 2, 3).to(dtype)),
        }
        return BlockDiagonal(blocks=blocks, shapes={"a.weight": (OUT, IN), "a.bias": (OUT,), "b.weight": (2, 3)})

    def dense(self) -> Tensor:
        gradients = normal(32, 9, 6)
        return torch.block_diag(hessian(layer_loss), ROW_VALUES[:OUT].diag(), moment(gradients))

    def test_solve_without_damping(self) -> None:  # a RankOneSum always needs damping
        with pytest.raises(ConditioningError, match="damped"):
            self.build(torch.float64).solve(self._vectors(0))


class TestBlockDiagonalWithPowers(CurvatureLaws):
    def build(self, dtype: torch.dtype) -> Curvature:
        blocks = {"weight": Gram.from_inputs(INPUTS.to(dtype)), "bias": Diagonal(values=ROW_VALUES[:OUT].to(dtype))}
        return BlockDiagonal(blocks=blocks, shapes={"weight": (OUT, IN), "bias": (OUT,)})

    def dense(self) -> Tensor:
        return torch.block_diag(hessian(layer_loss), ROW_VALUES[:OUT].diag())


DEFICIENT = normal(10, 2, IN)  # 2 tokens in 4 dimensions


# Damping


def test_damping_is_set_not_added() -> None:
    gram = Gram.from_inputs(INPUTS)
    assert gram.damped(0.5).damped(0.1).damping == gram.damped(0.1).damping


def test_damping_below_rounding_warns() -> None:
    gram = Gram.from_inputs(1e3 * INPUTS.float())
    with pytest.warns(ConditioningWarning, match="below the rounding of its largest eigenvalue"):
        gram.with_damping(1e-3)


# Exactness by name


@settings(max_examples=25, deadline=None)
@given(seed=seeds, number=st.integers(1, 30))
def test_eigenvalues_measured_again_are_never_further_from_the_truth(seed: int, number: int) -> None:
    outputs, inputs = normal(seed, number, OUT), normal(seed + 1, number, IN)
    gradients = outputs[:, :, None] * inputs[:, None, :]
    truth = moment(gradients.flatten(1))
    kronecker = Kronecker(output_factor=moment(outputs), input_factor=moment(inputs))
    corrected = EigenKronecker.from_gradients(kronecker, gradients)
    assert (corrected.matrix() - truth).norm() <= (kronecker.matrix() - truth).norm() + 1e-12
    assert corrected.trace() == pytest.approx(float(truth.trace()))


def test_eigenvalues_of_one_datum_are_exact() -> None:
    gradients = (normal(33, OUT, 1) @ normal(34, 1, IN))[None]
    kronecker = Kronecker(output_factor=moment(normal(33, 1, OUT)), input_factor=moment(normal(34, 1, IN)))
    for curvature in (kronecker, EigenKronecker.from_gradients(kronecker, gradients)):
        torch.testing.assert_close(curvature.matrix(), moment(gradients.flatten(1)))


def test_gram_quadratic_is_the_layer_loss() -> None:
    weight = normal(12, OUT, IN)
    assert Gram.from_inputs(INPUTS).quadratic(weight - normal(3, OUT, IN)) == pytest.approx(float(layer_loss(weight)))


@pytest.mark.parametrize("width", [5, 128, 300])
def test_row_quadratics_are_those_of_each_row(width: int) -> None:
    gram, changes = Gram.from_inputs(normal(50, 400, width)), normal(51, 2, 3, width)
    wanted = torch.stack([torch.tensor(gram.quadratic(row)) for row in changes.view(-1, width)]).view(2, 3)
    torch.testing.assert_close(gram.row_quadratics(changes), wanted.double())
    torch.testing.assert_close(wanted.double(), 0.5 * (changes * gram.matvec(changes)).sum(-1))


def test_the_target_of_two_streams_is_the_least_squares_solution() -> None:
    weight, inputs, reference = normal(40, OUT, IN), normal(41, 9, IN), normal(42, 9, IN)
    gram = Gram.from_inputs(inputs, reference)
    wanted = torch.linalg.lstsq(inputs, reference @ weight.T).solution.T
    torch.testing.assert_close(gram.target(weight), wanted)
    ridge = Gram.from_inputs(inputs, reference).with_damping(0.3)

    def loss(free: Tensor) -> Tensor:
        away = inputs @ free.T - reference @ weight.T
        return away.square().sum() / len(inputs) + 0.3 * (free - weight).square().sum()

    free = ridge.target(weight).requires_grad_()
    (slope,) = torch.autograd.grad(loss(free), free)
    assert float(slope.abs().max()) < 1e-12
    torch.testing.assert_close(Gram.from_inputs(inputs, inputs).damped(0.1).target(weight), weight)
    assert Gram.from_inputs(inputs).target(weight) is weight
    with pytest.raises(DataError, match="differ in shape"):
        Gram.from_inputs(inputs, reference[:3])


def test_curvatures_of_different_origin_are_not_joined() -> None:
    """A peer's EK-FAC takes factors per token and eigenvalues per sequence: off by orders of magnitude."""
    tokens, samples = (Origin("sampled Fisher", per, "mean loss") for per in ("position", "sample"))  # type: ignore[arg-type]
    one, other = (Diagonal(values=torch.ones(3), origin=origin) for origin in (tokens, samples))
    plain = Diagonal(values=torch.ones(3))
    with pytest.raises(
        OptionError, match="a sum mixes a sampled Fisher per position in mean loss with a sampled Fisher"
    ):
        Sum(terms=(one, other))
    with pytest.raises(OptionError, match="a BlockDiagonal mixes"):
        BlockDiagonal(blocks={"a": one, "b": other}, shapes={"a": (3,), "b": (3,)})
    assert Sum(terms=(one, plain)).origin == Scaled(original=one, factor=2.0).origin == tokens
    assert Scaled(original=one, factor=2.0, origin=samples).origin == samples


def test_the_order_of_the_flat_vector_is_that_of_the_shapes() -> None:
    one, other = Diagonal(values=torch.tensor([1.0, 2.0])), Diagonal(values=torch.tensor([3.0]))
    shapes = {"a": (2,), "b": (1,)}
    for blocks in ({"a": one, "b": other}, {"b": other, "a": one}):
        whole = BlockDiagonal(blocks=blocks, shapes=shapes)
        assert whole.diagonal().tolist() == whole.matvec(torch.ones(3)).tolist() == [1.0, 2.0, 3.0]


def test_the_damping_changes_no_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    kronecker = Kronecker(output_factor=OUTPUT_MOMENT, input_factor=moment(INPUTS))
    vector = normal(13, OUT, IN)
    blocks = BlockDiagonal(blocks={"a": kronecker}, shapes={"a": (OUT, IN)}).damped(0.2)
    first = blocks.solve(vector.flatten()), kronecker.damped(0.1).solve(vector), kronecker.eigen
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("decomposed again"))
    assert torch.equal(first[0], blocks.solve(vector.flatten()))
    assert torch.equal(first[1], kronecker.damped(0.1).solve(vector))


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

    def _matvec(self, vector: Tensor) -> Tensor:
        return vector

    def diagonal(self) -> Tensor:
        return torch.ones(2)


def test_missing_products_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedProduct, match="MatvecOnly has no inverse product"):
        MatvecOnly().solve(torch.ones(2))
    with pytest.raises(UnsupportedProduct, match="MatvecOnly has no inverse diagonal"):
        MatvecOnly().inverse_diagonal()


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


@pytest.mark.parametrize(("output", "inputs"), [((2, 2, 2), (3, 3)), ((2, 2), (3, 3, 3)), ((), (3, 3))], ids=str)
def test_kronecker_factors_are_matrices(output: tuple[int, ...], inputs: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="output factor"):
        Kronecker(output_factor=torch.ones(output), input_factor=torch.ones(inputs))


def test_curvatures_with_a_damping_of_their_own_are_not_joined() -> None:
    gram = Gram.from_inputs(INPUTS)
    for wrong in (
        lambda: Sum(terms=(gram.damped(0.1),)),
        lambda: Scaled(original=gram.damped(0.1), factor=2.0),
        lambda: BlockDiagonal(blocks={"a": gram.damped(0.1)}, shapes={"a": (OUT, IN)}),
    ):
        with pytest.raises(OptionError, match="damping of its own"):
            wrong()


def test_curvatures_that_do_not_fit_are_not_joined() -> None:
    gram = Gram.from_inputs(INPUTS)
    with pytest.raises(OptionError, match="cannot be added"):
        Sum(terms=(gram, Diagonal(values=FULL_VALUES)))
    with pytest.raises(OptionError, match="no curvatures"):
        Sum(terms=())
    with pytest.raises(OptionError, match="a of shape"):
        BlockDiagonal(blocks={"a": gram}, shapes={"a": (OUT, IN + 1)})
    with pytest.raises(OptionError, match="one shape for each"):
        BlockDiagonal(blocks={"a": gram}, shapes={})
    with pytest.raises(OptionError, match="multiplied by"):
        Scaled(original=gram, factor=0.0)


def test_eigenvalues_need_gradients_of_weights() -> None:
    kronecker = Kronecker(output_factor=OUTPUT_MOMENT, input_factor=moment(INPUTS))
    one, other = (Origin("sampled Fisher", per, "mean loss") for per in ("position", "sample"))  # type: ignore[arg-type]
    with pytest.raises(
        OptionError, match="per position in mean loss cannot take eigenvalues of a sampled Fisher per sam"
    ):
        EigenKronecker.from_gradients(replace(kronecker, origin=one), normal(0, 1, OUT, IN), other)
    with pytest.raises(DataError, match="must be"):
        EigenKronecker.from_gradients(kronecker, normal(0, OUT, IN))
    with pytest.raises(DataError, match="NaN or infinity"):
        EigenKronecker.from_gradients(kronecker, torch.full((1, OUT, IN), float("nan")).double())
