"""Constraints as a recipe says them: how their parts are joined."""

from typing import Literal

from hesse.constraints import Constraint, EitherSide, Grid, MixedGrid, Rotated, ScaledColumns
from hesse.errors import OptionError
from hesse.methods.constraint_parts import (
    CodebookOptions,
    GridOptions,
    LowRankOptions,
    OutlierOptions,
    SalientOptions,
    SignRankOneOptions,
    SparseOptions,
    TableOptions,
    VectorCodebookOptions,
)
from hesse.methods.strict import Strict

Basis = Literal["own", "scaled", "rotated", "either-side", "mixed"]


class ConstraintOptions(Strict):
    """One constraint; sparse and grid for both at once; or one of these, a codebook or a table with low_rank added.

    Outliers may be added to a grid, a codebook or a table. A grid may be of the weight with its columns scaled,
    in a rotated basis, with its groups along either side, or with bits mixed over groups (`basis`).
    """

    grid: GridOptions | None = None
    codebook: CodebookOptions | None = None
    vector_codebook: VectorCodebookOptions | None = None
    table: TableOptions | None = None
    sparse: SparseOptions | None = None
    low_rank: LowRankOptions | None = None
    outliers: OutlierOptions | None = None
    sign_rank_one: SignRankOneOptions | None = None
    salient: SalientOptions | None = None
    basis: Basis = "own"

    def build(self) -> Constraint:
        """The constraint.

        Raises:
            OptionError: there is none, they cannot be joined, or a value has no meaning.
        """
        names = [name for name in type(self).model_fields if name != "basis"]
        given = [name for name in names if getattr(self, name) is not None]
        parts: dict[str, Constraint] = {name: getattr(self, name).build() for name in given}
        if not parts:
            raise OptionError(f"a constraint needs one of {', '.join(names)}")
        if given == ["outliers"]:
            raise OptionError("outliers are what stays as it is beside a grid, codebook or table: give one of these")
        if len(parts) == 1:
            return _in_basis(parts[given[0]], self.basis)
        if self.basis != "own":
            raise OptionError(f"a {self.basis} basis is for one constraint alone, and there are {' and '.join(parts)}")
        *first, last = given
        base = self.sparse.build() & self.grid.build() if self.grid and self.sparse else parts[first[0]]
        if given == ["grid", "sparse"]:
            return base
        if last == "low_rank" and (first == ["grid", "sparse"] or len(first) == 1):
            return base + parts[last]
        if last == "outliers" and len(first) == 1 and first[0] in ("grid", "codebook", "table"):
            return base + parts[last]
        raise OptionError(f"{' and '.join(parts)} cannot be joined in one layer")


def _in_basis(constraint: Constraint, basis: Basis) -> Constraint:
    if basis in ("either-side", "mixed"):
        if not isinstance(constraint, Grid):
            raise OptionError(f"only a grid has groups of {basis} kind, not a {type(constraint).__name__}")
        return EitherSide(constraint) if basis == "either-side" else MixedGrid(constraint)
    if basis == "own":
        return constraint
    return ScaledColumns(constraint) if basis == "scaled" else Rotated(constraint)
