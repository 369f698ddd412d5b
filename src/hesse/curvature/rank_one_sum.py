"""H = (1/m) Σ gᵢgᵢᵀ: a Fisher kept as its gradients, all of them or a sliding window (WoodFisher, M-FAC)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.base import Curvature
from hesse.curvature.origin import Origin
from hesse.curvature.symmetric import add_upper, symmetric_from_upper
from hesse.errors import ConditioningError, DataError, OptionError
from hesse.finite import all_finite

CHUNK = 1 << 14  # products over longer axes lose digits in float32, so each such part is added up in float64


@dataclass(frozen=True, kw_only=True, eq=False)
class RankOneSum(Curvature):
    """H = (1/m) Σ gᵢgᵢᵀ + λI over m gradients of one parameter, or of many as one flat vector.

    With one gradient a sample this is an empirical Fisher (true labels) or a sampled true Fisher (labels drawn from the
    model), in nats per sequence or per token, whichever the gradients are of. The gradient of a mini-batch's mean
    gives neither. Costs in d dimensions: set-up O(d m²), a product O(d m), an entry of the inverse O(m) once
    `whitened` has been formed. `gradients` may be memory-mapped: they are read in parts.

    The m × m inner products are kept instead of M-FAC's recursion: the same products from one Cholesky factor.
    Source: WoodFisher (Singh and Alistarh, 2020), M-FAC (Frantar, Kurtic and Alistarh, 2021); Woodbury, 1950.

    Example:
        >>> H = RankOneSum.from_gradients(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))  # H = diag(2, 2)
        >>> H @ torch.tensor([1.0, 2.0])
        tensor([2., 4.])
        >>> H.with_damping(2.0).inverse() @ torch.tensor([1.0, 2.0])
        tensor([0.2500, 0.5000])
    """

    gradients: Tensor  # (m, *shape)
    inner_products: Tensor  # (m, m) float64

    @classmethod
    def from_gradients(cls, gradients: Tensor, origin: Origin | None = None) -> Self:
        """Return the sum over `gradients` (m, *shape), one a sample, of the stated origin.

        Raises:
            DataError: there is none, or one is not finite.
        """
        if gradients.ndim < 2 or gradients.shape[0] == 0:
            raise DataError(f"a RankOneSum needs gradients (m, ...) with m of 1 or more, not {tuple(gradients.shape)}")
        rows = gradients.reshape(len(gradients), -1)
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for part in _parts(rows):
            products = part.new_zeros(len(rows), len(rows))
            add_upper(products, part.T)
            total += products
        if not all_finite(total):
            index = int((~torch.isfinite(total.diagonal())).nonzero().flatten().tolist()[0])
            raise DataError(f"gradient {index} holds NaN or infinity, or overflows when it is squared")
        return cls(gradients=gradients, inner_products=symmetric_from_upper(total), origin=origin)

    def __post_init__(self) -> None:
        if self.inner_products.shape != (len(self.gradients), len(self.gradients)):
            raise OptionError("a RankOneSum takes the inner products (m, m) of its m gradients: use from_gradients")

    @property
    def shape(self) -> torch.Size:
        return self.gradients.shape[1:]

    @property
    def _held(self) -> Tensor:
        return self.gradients

    @property
    def _rows(self) -> Tensor:
        return self.gradients.reshape(len(self.gradients), -1)

    def along(self, vector: Tensor) -> Tensor:
        """Return ⟨gᵢ, v⟩ for each gradient (..., m) in float64, from `vector` (..., *shape)."""
        flat = vector.reshape(-1, self.shape.numel())
        total = torch.zeros(len(flat), len(self.gradients), dtype=torch.float64, device=flat.device)
        for ours, theirs in zip(_parts(self._rows), _parts(flat), strict=True):
            total += theirs.to(ours.dtype) @ ours.T
        return total.view(*vector.shape[: vector.ndim - len(self.shape)], -1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return Σ cᵢ gᵢ (..., *shape), from `coefficients` (..., m)."""
        summed = coefficients.reshape(-1, len(self.gradients)).to(self.gradients.dtype) @ self._rows
        return summed.view(*coefficients.shape[:-1], *self.shape)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.combine(self.along(vector) / len(self.gradients)).to(vector.dtype)

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of mλI + GGᵀ (m, m) in float64, G the gradients as rows.

        Raises:
            ConditioningError: there is no damping.
        """
        if self.damping == 0:
            raise ConditioningError(
                f"{len(self.gradients)} gradients in {self.shape.numel()} dimensions are inverted with damping only: "
                "use .damped(0.01) first"
            )
        shifted = self.inner_products.clone()
        shifted.diagonal().add_(len(self.gradients) * self.damping)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):
            raise ConditioningError(f"the gradients cannot be factorised at damping {self.damping:.3g}: use more")
        lower: Tensor = factor
        return lower

    def _core_solve(self, right: Tensor) -> Tensor:
        """Return (mλI + GGᵀ)⁻¹ times `right` (..., m) in float64."""
        flat = right.reshape(-1, len(self.gradients)).double()
        return torch.cholesky_solve(flat.T, self.factor).T.reshape(right.shape)

    def _solve(self, vector: Tensor) -> Tensor:
        # For a v that is a sum of the gradients, with a small λ, this is a small difference of two large terms, which
        # float32 cannot hold: use `solve_in_span` there.
        correction = self.combine(self._core_solve(self.along(vector)))
        return (vector - correction.to(vector.dtype)) / self.damping

    def solve_in_span(self, coefficients: Tensor) -> Tensor:
        """Return (H + λI)⁻¹ Σ cᵢ gᵢ (..., *shape) of `coefficients` (..., m), exact to rounding at any damping.

        The push-through identity: H⁻¹Gᵀc = Gᵀ (λI + GGᵀ/m)⁻¹ c, without cancellation.
        """
        return self.combine(self._core_solve(coefficients) * len(self.gradients))

    def diagonal(self) -> Tensor:
        parts = [part.double().square().mean(0) for part in _parts(self._rows)]
        return torch.cat(parts).to(self.gradients.dtype).view(self.shape)

    @cached_property
    def whitened(self) -> Tensor:
        """S (m, d) with (H + λI)⁻¹ = (I - SᵀS) / λ, of the size and type of the gradients."""
        result = torch.empty_like(self._rows)
        for part, place in zip(_parts(self._rows), _parts(result), strict=True):
            place.copy_(torch.linalg.solve_triangular(self.factor, part.double(), upper=False))
        return result

    def inverse_entry(self, row: int, column: int) -> float:
        """Return an entry of (H + λI)⁻¹ by indices into the flat parameter: O(m), once `whitened` has been formed."""
        left, right = (self.whitened[:, index].double() for index in (row, column))
        return (float(row == column) - float(left @ right)) / self.damping

    def inverse_diagonal(self) -> Tensor:
        whitened = "whitened" in self.__dict__
        pieces = []
        for part in _parts(self.whitened if whitened else self._rows):
            wide = part.double()
            if not whitened:
                wide = torch.linalg.solve_triangular(self.factor, wide, upper=False)
            pieces.append((1 - wide.square().sum(0)) / self.damping)
        return torch.cat(pieces).to(self.gradients.dtype).view(self.shape)

    def rank(self) -> int:
        rounding = torch.finfo(self.gradients.dtype).eps * max(len(self.gradients), 10)
        return int(torch.linalg.matrix_rank(self.inner_products, rtol=rounding, hermitian=True))

    def trace(self) -> float:
        return float(self.inner_products.diagonal().mean())

    def largest_eigenvalue(self) -> float:
        products = self.inner_products  # at least ‖K‖² / tr K, and exact where one direction holds everything
        trace = max(float(products.diagonal().sum()), torch.finfo(torch.float64).tiny)
        return float(products.square().sum()) / trace / len(self.gradients)


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """Yield `rows` (k, d) as (k, CHUNK) parts."""
    yield from torch.split(rows, CHUNK, dim=1)


class GradientWindow:
    """A sliding window of at most `size` gradients of shape `shape`, updated without rebuilding.

    Adding or replacing a gradient costs O(d m), and the next inverse product O(m³) more. Source: the dynamic algorithm
    of M-FAC (Frantar, Kurtic and Alistarh, 2021), with the inner products kept instead of its recursion.
    """

    def __init__(
        self,
        size: int,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise OptionError(f"a window of {size} gradients was requested: use 1 or more")
        self._rows = torch.zeros(size, *shape, dtype=dtype, device=device)
        self._inner_products = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._count = 0
        self._next = 0

    def __len__(self) -> int:
        return self._count

    def push(self, gradient: Tensor) -> None:
        """Add `gradient` (*shape), replacing the oldest one if the window is full.

        Raises:
            OptionError: the gradient has another shape.
            DataError: the gradient is not finite; the window is unchanged.
        """
        if gradient.shape != self._rows.shape[1:]:
            raise OptionError(
                f"a gradient of shape {tuple(gradient.shape)} does not fit a window of {tuple(self._rows.shape[1:])}"
            )
        if not all_finite(gradient):
            raise DataError("the gradient holds NaN or infinity")
        place, count = self._next, max(self._count, self._next + 1)
        self._rows[place] = gradient
        row = self._sum(count).along(self._rows[place])
        self._inner_products[place, :count] = row
        self._inner_products[:count, place] = row
        self._count, self._next = count, (place + 1) % len(self._rows)

    def curvature(self, damping: float = 0.0) -> RankOneSum:
        """Return the RankOneSum of the gradients in the window, with λ = `damping`.

        It shares the window's memory: the next `push` invalidates it.

        Raises:
            DataError: the window is empty.
        """
        if not self._count:
            raise DataError("the window holds no gradient yet")
        return self._sum(self._count).with_damping(damping)

    def _sum(self, count: int) -> RankOneSum:
        return RankOneSum(gradients=self._rows[:count], inner_products=self._inner_products[:count, :count])
