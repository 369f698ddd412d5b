"""Solver protocol and `solve`: the cheapest allowed weights, min ½ dᵀHd with w + d in S."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from hesse.constraints import Constraint
from hesse.curvature import Curvature
from hesse.errors import DataError, OptionError, UnsupportedProduct
from hesse.finite import all_finite

AnyConstraint = TypeVar("AnyConstraint", bound=Constraint)

OVERHEAD = 1 << 14  # bytes of vectors and small buffers beside the matrices


class Solver(ABC):
    """An algorithm in two steps: `init` factors a curvature once, `compute` then serves any number of weights."""

    curvatures: ClassVar[tuple[type[Curvature], ...]] = (Curvature,)  # that `init` takes

    def init(self, curvature: Curvature) -> Any:
        """Return whatever depends on the curvature alone; by default the curvature itself.

        Raises:
            UnsupportedProduct: this solver cannot use that curvature.
            ConditioningError: the curvature cannot be factorized at its damping.
        """
        if not isinstance(curvature, self.curvatures):
            kinds = " or ".join(
                f"{'an' if kind.__name__[0] in 'AEIO' else 'a'} {kind.__name__}" for kind in self.curvatures
            )
            raise UnsupportedProduct(f"{type(self).__name__} needs {kinds}, not a {type(curvature).__name__}")
        return curvature

    @abstractmethod
    def compute(self, state: Any, weight: Tensor, constraint: Constraint) -> Any:
        """Return the stored form of the cheapest member found for `weight` (out, in)."""

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        """Return the bytes that `solve` holds at most without its inputs, for a float32 weight of `shape` (out, in).

        The curvature's inputs are in float32 too; `held` are the numbers in its own tensors, which count where a
        solver copies them. By default what the constraint takes to encode and decode a weight.
        """
        return constraint.workspace(shape) + OVERHEAD


class InnerState(NamedTuple):
    """The curvature of a solver that prices what another one finds, and the state of that one."""

    curvature: Curvature
    inner: Any


def float32_bytes(shape: torch.Size, weights: float = 0, inputs: float = 0, outputs: float = 0) -> int:
    """Return the bytes of given numbers of float32 matrices (out, in), (in, in) and (out, out)."""
    rows, columns = shape
    return math.ceil(4 * (weights * rows * columns + inputs * columns**2 + outputs * rows**2)) + OVERHEAD


@dataclass(frozen=True, eq=False)
class Solution:
    """Allowed weights and their cost."""

    weight: Tensor  # (out, in), exactly the decoded `encoded`
    encoded: Any
    original: Tensor  # (out, in), the weight that was solved for
    curvature: Curvature

    @cached_property
    def predicted_loss_increase(self) -> float:
        """½ dᵀHd in the curvature's unit: for a Gram half the squared output error per token, for a Kronecker nats."""
        return self.curvature.quadratic(self.weight - self.original)


def require_constraint(solver: Solver, constraint: Constraint, kind: type[AnyConstraint]) -> AnyConstraint:
    """Return `constraint`, which must be of the only kind that the solver supports.

    Raises:
        UnsupportedProduct: it is not.
    """
    if not isinstance(constraint, kind):
        raise UnsupportedProduct(f"{type(solver).__name__} solves {kind.__name__}, not {type(constraint).__name__}")
    return constraint


def member_cost(curvature: Curvature, constraint: Constraint, code: Any, weight: Tensor) -> float:
    """Return ½ dᵀHd of the member stored as `code`, with d its difference from `weight` (out, in)."""
    return curvature.quadratic(constraint.decode(code).to(weight.dtype) - weight)


def solve(weight: Tensor, curvature: Curvature, constraint: Constraint, solver: Solver) -> Solution:
    """Return the member of `constraint` that `solver` finds for `weight` (out, in) under `curvature`.

    Raises:
        OptionError: the shapes do not fit each other or the constraint.
        DataError: the weight holds NaN or infinity, or is too large for the dtype of the constraint.
        UnsupportedProduct: the solver needs something that the curvature or the constraint does not offer.
        ConditioningError: the curvature cannot be factorized at its damping.
    """
    return solve_with(weight, curvature, constraint, solver, solver.init(curvature))


def solve_with(weight: Tensor, curvature: Curvature, constraint: Constraint, solver: Solver, state: Any) -> Solution:
    """Solve with the `state` that `solver.init(curvature)` returned before."""
    if weight.ndim != 2:
        raise OptionError(f"a weight must be a matrix (out, in), but this one has shape {tuple(weight.shape)}")
    dimensions = len(curvature.shape)
    if dimensions and weight.shape[-dimensions:] != curvature.shape:
        raise OptionError(f"a weight {tuple(weight.shape)} does not fit a curvature of shape {tuple(curvature.shape)}")
    if not all_finite(weight):
        raise DataError("the weight holds NaN or infinity")
    constraint.check(weight.shape)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    encoded = solver.compute(state, wide, constraint)
    solved = constraint.decode(encoded)
    if not all_finite(solved):
        largest = float(weight.abs().amax())
        raise DataError(f"the weight reaches {largest:.3g}, and overflows when it is stored as {constraint.dtype}")
    return Solution(solved.to(wide.dtype), encoded, wide, curvature)
