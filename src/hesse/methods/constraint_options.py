"""Constraints as a recipe says them: a part each, and how parts are joined."""

from typing import Literal

from pydantic import Field

from hesse.constraints import (
    Codebook,
    Constraint,
    EitherSide,
    Grid,
    LowRank,
    MixedGrid,
    Rotated,
    SalientColumns,
    ScaledColumns,
    SignRankOne,
    Sparse,
    Table,
    VectorCodebook,
)
from hesse.errors import OptionError
from hesse.methods.strict import Strict, Whole

Basis = Literal["own", "scaled", "rotated", "either-side", "mixed"]


class GridOptions(Strict):
    """Options of a Grid."""

    bits: Whole = 4
    group_size: Whole = 128
    symmetric: bool = True
    headroom: float = 0.0
    signed: bool = False

    def build(self) -> Grid:
        """The constraint."""
        return Grid(**self.model_dump())


class SparseOptions(Strict):
    """Options of a Sparse: a share such as 0.5, whose zeros come in a block of so many neighbours, or a pattern "2:4".

    `scope` says where a share is counted: in each row, each layer, or over all layers of the rule together, by their
    magnitudes ("global") or by LAMP's ("lamp"), which gives each layer a share of its own before it is solved.
    """

    amount: float | str = 0.5
    scope: Literal["layer", "row", "global", "lamp"] = "layer"
    block: Whole = 1

    def build(self) -> Sparse:
        """The constraint; of a share of several layers together that of a layer with as much."""
        parsed = parse_sparsity(self.amount)
        if parsed.of is not None:
            if self.scope in ("global", "lamp"):
                raise OptionError(f"a pattern such as {self.amount} is the same everywhere: leave --scope out")
            return Sparse(parsed.amount, parsed.of, block=self.block)
        return Sparse(parsed.amount, scope="row" if self.scope == "row" else "layer", block=self.block)


class LowRankOptions(Strict):
    """Options of a LowRank."""

    rank: Whole = 64

    def build(self) -> LowRank:
        """The constraint."""
        return LowRank(self.rank)


class TableOptions(Strict):
    """Options of a Table."""

    name: str = "fp4"
    group_size: Whole = 128

    def build(self) -> Table:
        """The constraint."""
        return Table(self.name, self.group_size)


class OutlierOptions(Strict):
    """The share of weights that stay as they are beside a grid or a codebook."""

    share: float = Field(default=0.005, gt=0, lt=1)

    def build(self) -> Sparse:
        """The constraint."""
        return Sparse(1 - self.share)


class CodebookOptions(Strict):
    """Options of a Codebook."""

    bits: Whole = 4

    def build(self) -> Codebook:
        """The constraint."""
        return Codebook(self.bits)


class SignRankOneOptions(Strict):
    """A SignRankOne has no options."""

    def build(self) -> SignRankOne:
        """The constraint."""
        return SignRankOne()


class SalientOptions(Strict):
    """Options of SalientColumns: which share of columns, and the grid that they are on."""

    share: float = 0.2
    grid: GridOptions = GridOptions(bits=4, group_size=-1, headroom=0.06)

    def build(self) -> SalientColumns:
        """The constraint."""
        return SalientColumns(self.share, self.grid.build())


class VectorCodebookOptions(Strict):
    """Options of a VectorCodebook."""

    bits: Whole = 2
    length: Whole = 4
    books: Whole = 1

    def build(self) -> VectorCodebook:
        """The constraint."""
        return VectorCodebook(self.bits, self.length, self.books)


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


def parse_sparsity(text: str | float) -> Sparse:
    """`0.5` as half, `"2:4"` as two kept of every four.

    Raises:
        OptionError: it is neither.
    """
    try:
        if isinstance(text, str) and ":" in text:
            kept, of = text.split(":")
            return Sparse(int(kept), int(of))
        return Sparse(float(text))
    except (ValueError, OverflowError):
        raise OptionError(f"sparsity is {text!r}, but must be a share such as 0.5 or a pattern such as 2:4") from None
