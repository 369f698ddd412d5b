"""Parts of a constraint in a recipe, and the options of a method that set them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationError
from typing_extensions import Self

from hesse.constraints import (
    BlockTable,
    Codebook,
    Constraint,
    Grid,
    LowRank,
    Microscaled,
    SalientColumns,
    SignRankOne,
    Sparse,
    Table,
    VectorCodebook,
)
from hesse.errors import OptionError
from hesse.methods.strict import Strict, Whole
from hesse.options import KNOWN, Option, known_option, type_text
from hesse.registry import Registry

SparsityScope = Literal["layer", "row", "global", "lamp"]


class ConstraintPart(Strict, ABC):
    """Part of a constraint in a recipe.

    `takes` maps fields of the part to options of a method; the first option is the one that asks for the part.
    """

    takes: ClassVar[dict[str, str]] = {}
    extensible: ClassVar[bool] = False  # a low rank may be added
    takes_outliers: ClassVar[bool] = False  # outliers may be added
    added: ClassVar[bool] = False  # is itself added to another part

    @classmethod
    def asked_by(cls) -> str | None:
        """Return the option that requests the part; None if there is none."""
        return next(iter(cls.takes.values()), None)

    @classmethod
    def chosen(cls, options: Mapping[str, Any]) -> Self:
        """Return the part with a method's options where given."""
        given = {own: options[name] for own, name in cls.takes.items() if name in options}
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            raise OptionError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None

    @classmethod
    def options(cls, present: bool) -> list[Option]:
        """Return the options of a method that the part takes; without defaults where it is not always present."""
        made = []
        for own, name in cls.takes.items():
            entry = cls.model_fields[own]
            default = entry.default if present else None
            if name in {option.name for option in KNOWN}:
                made.append(known_option(name, default))
            else:
                made.append(Option(name, type_text(entry.annotation), default, entry.description or name))
        return made

    @abstractmethod
    def build(self) -> Constraint:
        """The constraint."""


class GridOptions(ConstraintPart):
    """Options of a Grid."""

    takes: ClassVar[dict[str, str]] = {name: name for name in ("bits", "group_size", "symmetric", "headroom", "signed")}
    extensible = True
    takes_outliers = True

    bits: Whole = 4
    group_size: Whole = 128
    symmetric: bool = True
    headroom: float = 0.0
    signed: bool = False

    def build(self) -> Grid:
        return Grid(**self.model_dump())


class SparseOptions(ConstraintPart):
    """Options of a Sparse: a share such as 0.5, with zeros in blocks of `block` neighbours, or a pattern such as "2:4".

    `scope` is the set over which a share is counted: each row, each layer, or all layers of the rule together, by
    magnitude ("global") or by LAMP's score ("lamp"); the last two give each layer its own share before it is solved.
    """

    takes: ClassVar[dict[str, str]] = {"amount": "sparsity", "scope": "scope", "block": "block"}
    extensible = True

    amount: float | str = 0.5
    scope: SparsityScope = "layer"
    block: Whole = 1

    @classmethod
    def chosen(cls, options: Mapping[str, Any]) -> Self:
        if options.get("scope", "layer") not in get_args(SparsityScope):
            raise OptionError(f"there is no scope {options['scope']!r}; there are {', '.join(get_args(SparsityScope))}")
        return super().chosen(options)

    def build(self) -> Sparse:
        """Build the constraint; a share over several layers is built as the same share of each layer."""
        parsed = parse_sparsity(self.amount)
        if parsed.of is not None:
            if self.scope in ("global", "lamp"):
                raise OptionError(f"a pattern such as {self.amount} is the same everywhere: leave --scope out")
            return Sparse(parsed.amount, parsed.of, block=self.block)
        return Sparse(parsed.amount, scope="row" if self.scope == "row" else "layer", block=self.block)


class LowRankOptions(ConstraintPart):
    """Options of a LowRank."""

    takes: ClassVar[dict[str, str]] = {"rank": "rank"}
    added = True

    rank: Whole = 64

    def build(self) -> LowRank:
        return LowRank(self.rank)


class TableOptions(ConstraintPart):
    """Options of a Table."""

    takes: ClassVar[dict[str, str]] = {"name": "table", "group_size": "group_size"}
    extensible = True
    takes_outliers = True

    name: str = "fp4"
    group_size: Whole = 128

    def build(self) -> Table:
        return Table(self.name, self.group_size)


class BlockTableOptions(ConstraintPart):
    """Options of a BlockTable."""

    name: str = "fp8"
    group_size: Whole = 128
    height: Whole = 128

    def build(self) -> BlockTable:
        return BlockTable(self.name, self.group_size, self.height)


class MicroscaledOptions(ConstraintPart):
    """Options of a Microscaled."""

    takes: ClassVar[dict[str, str]] = {"name": "table", "group_size": "group_size"}

    name: str = "fp4"
    group_size: Whole = 32

    def build(self) -> Microscaled:
        return Microscaled(self.name, self.group_size)


class OutlierOptions(ConstraintPart):
    """Options of outliers: the share of weights that a grid or a codebook leaves unchanged."""

    takes: ClassVar[dict[str, str]] = {"share": "outliers"}
    added = True

    share: float = Field(default=0.005, gt=0, lt=1)

    def build(self) -> Sparse:
        return Sparse(1 - self.share)


class CodebookOptions(ConstraintPart):
    """Options of a Codebook."""

    takes: ClassVar[dict[str, str]] = {"bits": "bits"}
    extensible = True
    takes_outliers = True

    bits: Whole = 4

    def build(self) -> Codebook:
        return Codebook(self.bits)


class SignRankOneOptions(ConstraintPart):
    """Options of a SignRankOne, which has none."""

    def build(self) -> SignRankOne:
        return SignRankOne()


class SalientOptions(ConstraintPart):
    """Options of SalientColumns: the share of columns, and their grid."""

    share: float = 0.2
    grid: GridOptions = GridOptions(bits=4, group_size=-1, headroom=0.06)

    def build(self) -> SalientColumns:
        return SalientColumns(self.share, self.grid.build())


class VectorCodebookOptions(ConstraintPart):
    """Options of a VectorCodebook."""

    takes: ClassVar[dict[str, str]] = {"bits": "bits", "length": "vector_length", "books": "books"}
    extensible = True

    bits: Whole = 2
    length: Whole = 4
    books: Whole = 1

    def build(self) -> VectorCodebook:
        return VectorCodebook(self.bits, self.length, self.books)


PARTS: Registry[type[ConstraintPart]] = Registry(
    "constraint",
    entries={
        "grid": GridOptions,
        "codebook": CodebookOptions,
        "vector_codebook": VectorCodebookOptions,
        "table": TableOptions,
        "block_table": BlockTableOptions,
        "microscaled": MicroscaledOptions,
        "sparse": SparseOptions,
        "low_rank": LowRankOptions,
        "outliers": OutlierOptions,
        "sign_rank_one": SignRankOneOptions,
        "salient": SalientOptions,
    },
)


def constraint(name: str) -> Callable[[type[ConstraintPart]], type[ConstraintPart]]:
    """Register a `ConstraintPart` that methods and recipes can name.

    Example:
        >>> @hesse.methods.constraint("coarse")
        ... class CoarseOptions(hesse.methods.ConstraintPart):
        ...     takes = {"group_size": "group_size"}
        ...     group_size: int = 64
        ...
        ...     def build(self):
        ...         return hesse.Grid(2, self.group_size)

    Raises:
        OptionError: the name is taken.
    """
    return partial(PARTS.register, name)


def parse_sparsity(text: str | float) -> Sparse:
    """Parse a sparsity: `0.5` is half zeros, `"2:4"` keeps two of every four weights.

    Raises:
        OptionError: the text is neither a share nor a pattern.
    """
    try:
        if isinstance(text, str) and ":" in text:
            kept, of = text.split(":")
            return Sparse(int(kept), int(of))
        return Sparse(float(text))
    except (ValueError, OverflowError):
        raise OptionError(f"sparsity is {text!r}, but must be a share such as 0.5 or a pattern such as 2:4") from None
