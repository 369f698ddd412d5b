"""Constraints in a recipe, built from their parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, field_validator, model_validator

from hesse.constraints import Constraint, EitherSide, Grid, MixedGrid, Rotated, ScaledColumns
from hesse.errors import OptionError
from hesse.methods.constraint_parts import (
    PARTS,
    BlockTableOptions,
    CodebookOptions,
    ConstraintPart,
    GridOptions,
    LowRankOptions,
    MicroscaledOptions,
    OutlierOptions,
    SalientOptions,
    SignRankOneOptions,
    SparseOptions,
    TableOptions,
    VectorCodebookOptions,
)
from hesse.methods.strict import Strict
from hesse.registry import Registry


@dataclass(frozen=True)
class Basis:
    """Basis or grouping in which a weight satisfies a constraint."""

    wrap: Callable[[Any], Constraint]
    grids_only: bool = False


BASES = Registry(
    "basis",
    entries={
        "own": Basis(lambda constraint: constraint),
        "scaled": Basis(ScaledColumns),
        "rotated": Basis(Rotated),
        "either-side": Basis(EitherSide, grids_only=True),
        "mixed": Basis(MixedGrid, grids_only=True),
    },
)


class ConstraintOptions(Strict):
    """Constraint in a recipe: one part; sparse and grid together; or one of these, a codebook or a table plus low_rank.

    Outliers may be added to a grid, a codebook or a table. A grid may be of the weight with its columns scaled,
    in a rotated basis, with its groups along either side, or with bits mixed over groups (`basis`). Other keys are
    constraints that another package has registered.
    """

    model_config = ConfigDict(extra="allow")

    grid: GridOptions | None = None
    codebook: CodebookOptions | None = None
    vector_codebook: VectorCodebookOptions | None = None
    table: TableOptions | None = None
    block_table: BlockTableOptions | None = None
    microscaled: MicroscaledOptions | None = None
    sparse: SparseOptions | None = None
    low_rank: LowRankOptions | None = None
    outliers: OutlierOptions | None = None
    sign_rank_one: SignRankOneOptions | None = None
    salient: SalientOptions | None = None
    basis: str = "own"

    @field_validator("basis")
    @classmethod
    def _known_basis(cls, name: str) -> str:
        if name not in BASES:
            raise ValueError(f"there is no basis {name!r}; there are {', '.join(BASES)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _registered(cls, content: Any) -> Any:
        """Read the parts that other packages have registered, and refuse all other unknown keys."""
        if not isinstance(content, dict):
            return content
        others = {key: value for key, value in content.items() if key not in cls.model_fields}
        for key in others:
            if key not in PARTS:
                raise ValueError(f"{key!r} is not a known key; there are {', '.join((*PARTS, 'basis'))}")
        return {**content, **{key: PARTS[key].model_validate(value) for key, value in others.items()}}

    @property
    def parts(self) -> dict[str, ConstraintPart]:
        """Return the given parts; parts that are added to others come last."""
        names = [*(name for name in type(self).model_fields if name != "basis"), *(self.model_extra or {})]
        given = {name: part for name in names if (part := getattr(self, name)) is not None}
        return dict(sorted(given.items(), key=lambda entry: entry[1].added))

    def build(self) -> Constraint:
        """Build the constraint.

        Raises:
            OptionError: there is no part, the parts cannot be combined, or a value is invalid.
        """
        given = list(self.parts)
        built = {name: part.build() for name, part in self.parts.items()}
        if not given:
            raise OptionError(f"a constraint needs one of {', '.join(PARTS)}")
        if given == ["outliers"]:
            raise OptionError("outliers are the unchanged weights of a grid, codebook or table: give one of these")
        if len(given) == 1:
            return _in_basis(built[given[0]], self.basis)
        if self.basis != "own":
            raise OptionError(f"a {self.basis} basis is for a single constraint, but there are {' and '.join(given)}")
        *first, last = given
        base = self.sparse.build() & self.grid.build() if self.grid and self.sparse else built[first[0]]
        if given == ["grid", "sparse"]:
            return base
        base_part = self.parts[first[0]]
        if last == "low_rank" and (first == ["grid", "sparse"] or (len(first) == 1 and base_part.extensible)):
            return base + built[last]
        if last == "outliers" and len(first) == 1 and base_part.takes_outliers:
            return base + built[last]
        raise OptionError(f"{' and '.join(given)} cannot be combined in one layer")


def _in_basis(constraint: Constraint, basis: str) -> Constraint:
    entry = BASES[basis]
    if entry.grids_only and not isinstance(constraint, Grid):
        raise OptionError(f"only a grid has groups of {basis} kind, not a {type(constraint).__name__}")
    return entry.wrap(constraint)
