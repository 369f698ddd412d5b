"""Tests that any constraint inherits: its stored form, its projection, its bits and its refusals."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from torch import Tensor

from hesse.constraints import Constraint
from hesse.constraints.base import round_to
from hesse.errors import OptionError
from hesse.testing.numbers import laws, normal, seeds

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


class ConstraintLaws:
    """Laws of every set S: exact storage, idempotent projection, bits that count what is stored.

    A subclass supplies `build`, and where the defaults do not fit `shape`, `again`, `rivals`, `stored_bits` and
    `refusals`.

        class TestMine(ConstraintLaws):
            def build(self, dtype): return Mine(dtype=dtype)
            def stored_bits(self, code): return code.codes.numel() * 4 + code.scale.numel() * 16
    """

    shape: tuple[int, int] = (8, 24)
    metrics: ClassVar[tuple[bool, ...]] = (False, True)  # with and without one; a set may refuse metrics
    repeats: float | None = 1e-6  # relative change of a member that is projected again; None where that is no promise

    @abstractmethod
    def build(self, dtype: torch.dtype) -> Constraint:
        """Return the constraint whose scales and values are stored in `dtype`."""

    def again(self, constraint: Constraint, code: Any) -> Any:
        """Return the stored form of a member that is projected again.

        A set whose scales follow the range of a weight overrides it, to project onto the scales that are stored.
        """
        return constraint.encode(constraint.decode(code))

    def rivals(self, constraint: Constraint, code: Any, seed: int) -> Iterator[Any]:
        """Yield stored forms of other members, to none of which a weight is nearer than to its `code`.

        By default the members nearest to other weights: right where the projection is the exact minimum over the set.
        """
        for other, scale in enumerate((1e-2, 1e-1, 1.0)):
            near = constraint.decode(code).double() + scale * normal(seed + other + 1, *self.shape)
            yield constraint.encode(near)

    def stored_bits(self, code: Any) -> float:
        """Return the bits that a stored form in 16-bit numbers takes, counted on its tensors."""
        pytest.skip("nothing to count")

    def refusals(self) -> Iterator[Callable[[], object]]:
        """Yield constructions and checks that must raise OptionError."""
        return iter(())

    def _weight(self, seed: int) -> Tensor:
        return normal(seed, *self.shape) * normal(seed + 1, self.shape[1]).exp()

    @DTYPES
    def test_what_is_stored_decodes_to_the_member(self, dtype: torch.dtype) -> None:
        constraint, weight = self.build(dtype), self._weight(0)
        constraint.check(weight.shape)
        code = constraint.encode(weight.clone())
        decoded = constraint.decode(code)
        assert decoded.shape == weight.shape
        assert decoded.dtype in (torch.float32, torch.float64)
        assert bool(decoded.isfinite().all())
        assert torch.equal(constraint.decode(code), decoded)
        assert torch.equal(constraint.nearest(weight), decoded.to(weight.dtype))

    @DTYPES
    def test_stored_numbers_are_of_the_stored_type(self, dtype: torch.dtype) -> None:
        """Storing them changes none, and codes fit their bytes."""
        constraint = self.build(dtype)
        for tensor in stored_tensors(constraint.encode(self._weight(1))):
            assert tensor.dtype in (torch.bool, torch.uint8, torch.int8, torch.int32) or tensor.is_floating_point()
            if tensor.is_floating_point():
                assert torch.equal(round_to(tensor, dtype).to(tensor), tensor)

    def test_a_weight_is_left_as_it_is(self) -> None:
        weight, constraint = self._weight(2), self.build(torch.float32)
        before = weight.clone()
        constraint.encode(weight)
        assert torch.equal(weight, before)

    @laws
    @given(seed=seeds)
    def test_law_a_member_projects_to_itself(self, seed: int) -> None:
        if self.repeats is None:
            pytest.skip("no projection in the strict sense")
        constraint = self.build(torch.float64)
        code = constraint.encode(self._weight(seed))
        member = constraint.decode(code)
        change = (constraint.decode(self.again(constraint, code)) - member).norm() / member.norm().clamp(min=1e-30)
        assert float(change) <= self.repeats

    @laws
    @given(seed=seeds)
    def test_law_no_other_member_is_nearer(self, seed: int) -> None:
        constraint, weight = self.build(torch.float64), self._weight(seed)
        for weighted in self.metrics:
            metric = normal(seed + 99, *self.shape).abs() + 0.1 if weighted else torch.ones_like(weight)
            code = constraint.encode(weight, metric if weighted else None)
            distance = constraint.distance(weight, code, metric)
            for rival in self.rivals(constraint, code, seed):
                assert distance <= constraint.distance(weight, rival, metric) * (1 + 1e-6) + 1e-12

    @laws
    @given(seed=seeds)
    def test_law_independent_rows_are_projected_alone(self, seed: int) -> None:
        constraint, weight = self.build(torch.float32), self._weight(seed)
        if not constraint.rows_are_independent:
            pytest.skip("rows depend on one another")
        half = len(weight) // 2 // constraint.together * constraint.together or len(weight) // 2
        whole = constraint.nearest(weight)
        assert torch.equal(torch.cat([constraint.nearest(part) for part in (weight[:half], weight[half:])]), whole)

    def test_bits_are_those_that_are_stored(self) -> None:
        constraint = self.build(torch.bfloat16)
        code = constraint.encode(self._weight(3))
        bits = constraint.bits_per_weight(torch.Size(self.shape)) * self._weight(3).numel()
        assert bits == pytest.approx(self.stored_bits(code), rel=1e-9)

    def test_it_is_refused_by_name_where_it_makes_no_sense(self) -> None:
        for number, refusal in enumerate(self.refusals()):
            with pytest.raises(OptionError):
                refusal()
                pytest.fail(f"refusal {number} was let through")

    def test_other_types_store_the_same_set(self) -> None:
        constraint = self.build(torch.float32)
        assert constraint.stored_as(torch.bfloat16) == self.build(torch.bfloat16)
        assert constraint.stored_as(torch.float32) == constraint

    def test_sums_name_both_sets(self) -> None:
        constraint = self.build(torch.float32)
        try:
            both = constraint + constraint
        except OptionError as error:
            assert "two parts" in str(error)
            return
        assert (both.base, both.correction) == (constraint, constraint)  # type: ignore[attr-defined]


def stored_tensors(code: Any) -> Iterator[Tensor]:
    """Yield the tensors of a stored form."""
    if isinstance(code, Tensor):
        yield code
    elif is_dataclass(code):
        for field in fields(code):
            yield from stored_tensors(getattr(code, field.name))
