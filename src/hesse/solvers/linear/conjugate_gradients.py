"""(H + λI) x = b from products alone: to a tolerance, with a report of how it ended, or a few steps of a refit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hesse.curvature import Curvature
from hesse.errors import DataError, OptionError, UnsupportedProduct
from hesse.finite import all_finite

Ending = Literal["converged", "negative curvature", "iterations"]


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """x and how the solve ended; the worst of several right-hand sides where there are several."""

    solution: Tensor
    method: str  # "direct" or "conjugate gradients"
    ending: Ending
    relative_residual: float  # ‖b - (H + λI) x‖ / ‖b‖, recomputed at the end
    iterations: int
    negative_curvature: Tensor | None = None  # a unit vector v with vᵀ(H + λI)v < 0, if one was found
    curvature_along: float | None = None  # and that value

    @property
    def converged(self) -> bool:
        """True if the residual is within the tolerance."""
        return self.ending == "converged"

    @property
    def sentence(self) -> str:
        """One sentence on how the solve ended and what to do next."""
        size = f"the relative residual is {self.relative_residual:.1e}"
        if self.method == "direct":
            return f"Solved directly; {size}."
        if self.converged:
            return f"Conjugate gradients converged in {self.iterations} iterations; {size}."
        if self.ending == "negative curvature":
            return (
                f"Conjugate gradients met negative curvature ({self.curvature_along:.3g}) after {self.iterations} "
                f"iterations and stopped there; {size}: use damping above {-(self.curvature_along or 0):.3g}, or a "
                "GaussNewton"
            )
        return (
            f"Conjugate gradients did not converge in {self.iterations} iterations; {size}: use more iterations, more "
            "damping, or a preconditioner"
        )


def linear_solve(
    curvature: Curvature, vector: Tensor, *, tolerance: float = 1e-6, max_iterations: int = 1000
) -> LinearSolution:
    """(H + λI)⁻¹ v of `vector` (..., *shape): by the curvature's own inverse product, by conjugate gradients without.

    Raises:
        ConditioningError: the curvature's own inverse product refuses it.
    """
    try:
        solution = curvature.solve(vector)
    except UnsupportedProduct:
        return conjugate_gradients(curvature, vector, tolerance=tolerance, max_iterations=max_iterations)
    residual = _residual(curvature, solution, vector)
    return LinearSolution(solution, "direct", "converged", _worst(residual, vector, curvature), 0)


def conjugate_gradients(
    curvature: Curvature,
    vector: Tensor,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    preconditioner: Curvature | None = None,
    start: Tensor | None = None,
) -> LinearSolution:
    """(H + λI)⁻¹ v of `vector` (..., *shape), each leading index its own problem, from products alone.

    A problem stops when its residual is `tolerance` times ‖v‖ or when it meets a direction of negative curvature; its
    best x so far is kept. `preconditioner.solve` is applied to residuals. Source: Hestenes and Stiefel, 1952;
    stopping at negative curvature: Steihaug, 1983.

    Raises:
        OptionError: the tolerance or the number of iterations has no meaning.
        DataError: a product gave NaN or infinity.
    """
    if not tolerance > 0:
        raise OptionError(f"the tolerance is {tolerance}: use a number above 0, such as 1e-6")
    if max_iterations < 1:
        raise OptionError(f"{max_iterations} iterations were asked: use 1 or more")
    lead = vector.ndim - len(curvature.shape) if len(curvature.shape) else 0
    right = vector.reshape(-1, *vector.shape[lead:])
    axes = tuple(range(1, right.ndim))

    def dot(left: Tensor, other: Tensor) -> Tensor:
        return (left.double() * other.double()).sum(axes, keepdim=True)

    solution = torch.zeros_like(right) if start is None else start.reshape(right.shape).clone()
    residual = right.clone() if start is None else _residual(curvature, solution, right)
    direction = residual if preconditioner is None else preconditioner.solve(residual)
    strength = dot(residual, direction)
    goal = tolerance * dot(right, right).sqrt()
    negative: Tensor | None = None
    along = None
    active = dot(residual, residual).sqrt() > goal
    iterations = 0
    while bool(active.any()) and iterations < max_iterations:
        product = curvature.matvec(direction) + curvature.damping * direction
        bend = dot(direction, product)
        if not all_finite(bend):
            raise DataError("a product with the curvature gave NaN or infinity: check the model and its data")
        bent = active & (bend <= 0)
        if bool(bent.any()) and negative is None:
            first = int(bent.flatten().nonzero()[0])
            length = float(direction[first].double().norm())
            negative, along = direction[first] / length, float(bend.flatten()[first]) / length**2
        active = active & ~bent
        step = torch.where(active, strength / bend, 0).to(direction.dtype)
        solution = solution + step * direction
        residual = residual - step * product
        solved = residual if preconditioner is None else preconditioner.solve(residual)
        before, strength = strength, dot(residual, solved)
        ratio = torch.where(active, strength / before, 0).to(direction.dtype)
        direction = solved + ratio * direction
        active = active & (dot(residual, residual).sqrt() > goal)
        iterations += 1
    worst = _worst(_residual(curvature, solution, right), right, curvature)
    ending: Ending = "negative curvature" if negative is not None else "converged"
    if negative is None and bool(active.any()):
        ending = "iterations"
    return LinearSolution(
        solution.view(vector.shape), "conjugate gradients", ending, worst, iterations, negative, along
    )


def conjugate_steps(
    start: Tensor,
    residual: Tensor,
    metric: Tensor,
    product: Callable[[Tensor], Tensor],
    steps: int,
    total: Callable[[Tensor], Tensor] = torch.sum,
) -> Tensor:
    """Return `start` after at most `steps` steps towards the minimum of ½ xᵀQx - bᵀx, in the precision of `start`.

    `residual` (of the shape of `start`) is b - Q `start`, `metric` (which broadcasts to it) the diagonal of Q, which
    preconditions (an entry that is not positive counts as 1), and `product(v)` is Q v. `total` adds up the entries of
    one problem: all of them, or with `row_sums` those of each row, where every row is a problem of its own and takes
    steps of its own length. The steps end early where rounding leaves no descent direction. No step raises the cost,
    beyond rounding. Source: Hestenes and Stiefel, 1952.
    """
    metric = torch.where(metric > 0, metric, 1)
    result = start
    direction = residual / metric
    strength = total(residual * direction)
    for _ in range(steps):
        image = product(direction)
        bend = total(direction * image)
        if not bool(((strength > 0) & (bend > 0)).any()):
            break
        length = strength / bend
        length = torch.where(length.isfinite(), length, 0)  # 0 for a row that is solved
        result = result + length * direction
        residual = residual - length * image
        scaled = residual / metric
        before, strength = strength, total(residual * scaled)
        ratio = strength / before
        direction = scaled + torch.where(ratio.isfinite(), ratio, 0) * direction
    return result


def row_sums(matrix: Tensor) -> Tensor:
    """Return the sum of each row (rows, 1) of `matrix` (rows, n)."""
    return matrix.sum(1, keepdim=True)


def _residual(curvature: Curvature, solution: Tensor, right: Tensor) -> Tensor:
    return right - curvature.matvec(solution) - curvature.damping * solution


def _worst(residual: Tensor, right: Tensor, curvature: Curvature) -> float:
    """Return the largest of the relative residuals of all problems."""
    inner = max(len(curvature.shape), 1)
    rows, wanted = (t.double().reshape(-1, t.shape[-inner:].numel()).norm(dim=1) for t in (residual, right))
    return float((rows / wanted.clamp(min=torch.finfo(torch.float64).tiny)).amax())
