"""Second pass of EK-FAC: measure the eigenvalues in the basis of the factors' eigenvectors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hesse.curvature import Curvature, EigenKronecker, Kronecker, Objective
from hesse.errors import OptionError
from hesse.passes.parts import ParameterPart
from hesse.passes.per_sample import BUDGET, FisherKind, GradientPass
from hesse.passes.recorded_batch import GradientUnit, RecordedBatch, Rows

TOGETHER = 1 << 26  # bytes of rotated gradients in one step


def eigen_kronecker(
    objective: Objective, kronecker: Mapping[str, Curvature], *, seed: int = 0, budget: int = BUDGET
) -> dict[str, EigenKronecker]:
    """Return curvatures with the eigenvectors of `kronecker`, by parameter, and eigenvalues measured in a pass.

    Labels and reduction are those of the factors' origin. Per position Λ = Σ (Rᵀg)² (Cᵀx)² over positions; per sample
    Λ = Σ (Rᵀ (Σ g xᵀ) C)² with the whole gradient of each sample. With the factors' `seed` no matrix with these
    eigenvectors is nearer to the Fisher's block. Parameters whose curvature is not a single Kronecker product (biases,
    norms, a weight tied to an embedding) are left out. Source: George et al., 2018.

    Raises:
        OptionError: a factor has no origin, or the factors' origins differ.
    """
    factors = {name: c for name, c in kronecker.items() if isinstance(c, Kronecker)}
    origins = {c.origin for c in factors.values()}
    if len(origins) != 1 or None in origins:
        raise OptionError("the Kronecker factors must be of one origin: use those of one estimate_curvatures call")
    origin = next(iter(origins))
    assert origin is not None
    kind: FisherKind = "empirical" if origin.matrix == "empirical Fisher" else "sampled"
    per: GradientUnit = "position" if origin.per == "position" else "sample"
    part_of = Objective(objective.model, objective.loss, objective.data, tuple(factors), objective.forward)
    walk = GradientPass(part_of, kind, seed=seed, budget=budget, apart=per == "sample")
    sums = _Eigenvalues({name: walk.parts[name][0] for name in factors}, factors, per)
    for passage in walk:
        sums.add(passage)
    if walk.others:
        raise OptionError(f"{walk.others[0]} is not the weight of a layer here: take the factors' own objective")
    return {
        name: EigenKronecker(
            row_vectors=sums.vectors[name][0],
            column_vectors=sums.vectors[name][1],
            eigenvalues=sums.totals[name] * walk.scale,
            origin=origin,
        )
        for name in factors
    }


class _Eigenvalues:
    """Sums of squared gradients in the eigenvectors' basis."""

    def __init__(self, parts: dict[str, ParameterPart], factors: dict[str, Kronecker], per: GradientUnit) -> None:
        self.parts, self.per = parts, per
        # In the factors' own precision: the eigenvalues are measured in the resulting basis.
        known: dict[int, Tensor | None] = {}  # layers with the same inputs share a factor, and so its eigenvectors
        self.vectors: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.totals: dict[str, Tensor] = {}
        for name, curvature in factors.items():
            self.totals[name] = torch.zeros(curvature.shape, dtype=curvature.dtype, device=curvature.device)
            sides = []
            for factor in curvature.factors:
                if id(factor) not in known:
                    known[id(factor)] = None if factor.ndim == 1 else torch.linalg.eigh(factor)[1]
                sides.append(known[id(factor)])
            self.vectors[name] = (sides[0], sides[1])

    def add(self, passage: RecordedBatch) -> None:
        """Add a recorded batch."""
        rotated: dict[object, Tensor] = {}  # inputs that several layers share
        for name, part in self.parts.items():
            rows = passage.rows(part)
            if rows is not None:
                self.totals[name] += self._squares(name, part, rows, rotated)

    def _squares(self, name: str, part: ParameterPart, rows: Rows, rotated: dict[object, Tensor]) -> Tensor:
        first, second = self.vectors[name]
        left, right = (second, first) if part.transposed else (first, second)
        dtype = self.totals[name].dtype
        gradients = rows.gradients.to(dtype)
        if left is not None and right is not None and self.per == "sample" and _many_positions(rows):
            square = _of_samples(gradients, rows.inputs.to(dtype), left, right)
            return square.T if part.transposed else square
        key = (rows.source, id(right))
        if key not in rotated:
            inputs = rows.inputs if rows.vocabulary else rows.inputs.to(dtype)
            rotated[key] = inputs if right is None else inputs @ right
        square = self._summed(gradients if left is None else gradients @ left, rotated[key], rows)
        return square.T if part.transposed else square

    def _summed(self, gradients: Tensor, inputs: Tensor, rows: Rows) -> Tensor:
        """Return the sum of squares (out, in) over positions, or over samples' sums."""
        if rows.vocabulary:
            return _of_tokens(gradients, inputs, rows.vocabulary, self.per)
        if self.per == "position":
            return gradients.flatten(0, 1).square().T @ inputs.flatten(0, 1).square()
        return _of_samples(gradients, inputs)


def _many_positions(rows: Rows) -> bool:
    """True if rotating a sample's gradient costs less than rotating its positions."""
    (_, positions, wide), narrow = rows.inputs.shape, rows.gradients.shape[-1]
    return wide * narrow * (wide + narrow) < positions * (wide**2 + narrow**2)


def _of_samples(gradients: Tensor, inputs: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """Return Σ (Lᵀ (Σ g xᵀ) R)² (out, in) over samples; None for L or R means that the rows are already rotated."""
    total = gradients.new_zeros(gradients.shape[-1], inputs.shape[-1])
    step = max(TOGETHER // (total.numel() * total.element_size()), 1)
    for some, others in zip(torch.split(gradients, step), torch.split(inputs, step), strict=True):
        summed = some.transpose(1, 2) @ others
        summed = summed if left is None else left.T @ summed
        total += (summed if right is None else summed @ right).square().sum(0)
    return total


def _of_tokens(gradients: Tensor, ids: Tensor, vocabulary: int, per: GradientUnit) -> Tensor:
    """Return the same for an embedding: gradients summed by token id."""
    total = gradients.new_zeros(vocabulary, gradients.shape[-1])
    if per == "position":
        return total.index_add_(0, ids.flatten(), gradients.flatten(0, 1).square()).T
    for tokens, slopes in zip(ids, gradients, strict=True):
        total += gradients.new_zeros(total.shape).index_add_(0, tokens, slopes).square()
    return total.T
