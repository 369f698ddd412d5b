"""The options of methods: what each means, and its default in a method."""

from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option of a method: an argument of its verb, and an option of the command line where that has the verb."""

    name: str
    type: str  # as in a signature, such as "int"
    default: Any  # None: absent unless it is given
    help: str

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return flag(self.name)

    @property
    def default_text(self) -> str:
        """The default as a reader types it."""
        if self.default is None:
            return "-"
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return "--" + name.replace("_", "-")


def _option(help: str) -> Any:
    return field(default=None, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """What a call can change about a method; None leaves the method's own choice."""

    bits: int | None = _option("Bits a weight, 2 to 8.")
    group_size: int | None = _option("Columns that share a scale; -1 for one scale a row.")
    symmetric: bool | None = _option("Use a grid around zero.")
    headroom: float | None = _option("Steps between codes that the scale leaves beyond the largest weight, 0 to 2.")
    signed: bool | None = _option("Let the scales of a symmetric grid be negative.")
    sparsity: str | float | None = _option("Share of zeros such as 0.5, or N kept of M: 2:4.")
    scope: str | None = _option("Where a share of zeros is counted: layer, row, global or lamp.")
    block: int | None = _option("Neighbors in a row that are zero together, such as 4.")
    rank: int | None = _option("Rank of the two thin factors.")
    outliers: float | None = _option("Share of weights that keep their values beside the grid or table.")
    table: str | None = _option("Table of values: fp4, fp6, fp8, nf2, nf3 or nf4.")
    vector_length: int | None = _option("Outputs whose weights form one vector of the codebook.")
    books: int | None = _option("Codebooks whose entries are added.")
    act_order: bool | None = _option("Solve columns by falling E[x²].")
    damping: float | None = _option("Share of the curvature's mean eigenvalue that is added to it.")
    input_bits: int | None = _option("Bits that a loader rounds each token's inputs to, 2 to 8; not at all if absent.")

    def over(self, defaults: "Options") -> "Options":
        """Return these options where given, and `defaults` elsewhere."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(defaults, **given)


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and a help: one option of a class whose fields are its options."""
    return field(default=default, metadata={"help": help})


def settings_of(kind: type) -> tuple[Option, ...]:
    """Return the options that a dataclass has, its fields with a help, as a row of the table lists them."""
    return tuple(
        Option(each.name, _type_name(each.type), None if each.default is MISSING else each.default, help)
        for each in fields(kind)
        if (help := each.metadata.get("help"))
    )


def _type_name(kind: Any) -> str:
    """The type as in a signature, without None."""
    text = kind.__name__ if isinstance(kind, type) else str(kind)
    return text.replace("typing.", "").removesuffix(" | None")


def help_of(name: str) -> str:
    """Return the help of one of the `Options`."""
    return str(Options.__dataclass_fields__[name].metadata["help"])
