"""The options of methods: what each means, and its default in a method."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from hesse.errors import OptionError

OPPOSITES = {"symmetric": "--asymmetric", "signed": "--unsigned"}  # of other flags: --no-...


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


_TYPES: dict[str, type] = {"int": Integral, "float": Real, "str": str, "bool": bool, "None": type(None)}


def check_types(types: Mapping[str, str], options: Mapping[str, Any]) -> None:
    """Check options against their types, as in a signature; types of other kinds than numbers and text pass.

    Raises:
        OptionError: an option is of another type.
    """
    for name, value in options.items():
        kinds = types[name].split(" | ")
        if not set(kinds) <= set(_TYPES):
            continue
        truth = isinstance(value, bool)  # which is an Integral too
        if not any(isinstance(value, _TYPES[kind]) and (not truth or kind == "bool") for kind in kinds):
            raise OptionError(f"{name} is {value!r}: give {' or '.join(kinds)}")


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return "--" + name.replace("_", "-")


def opposite(name: str) -> str:
    """Return the flag that turns a boolean option off."""
    return OPPOSITES.get(name, flag(f"no_{name}"))


def _option(help: str) -> Any:
    return field(default=None, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """Options of a call to a method; None keeps the method's default."""

    bits: int | None = _option("Bits per weight, 2 to 8.")
    group_size: int | None = _option("Columns that share a scale; -1 for one scale a row.")
    symmetric: bool | None = _option("Use a grid around zero, without zero points.")
    headroom: float | None = _option("Steps between codes that the scale leaves beyond the largest weight, 0 to 2.")
    signed: bool | None = _option("Allow negative scales in a symmetric grid.")
    sparsity: str | float | None = _option(
        "Share of single weights to make zero, such as 0.5, or a pattern such as 2:4."
    )
    scope: str | None = _option("Where a sparsity is counted: layer, row, global or lamp.")
    block: int | None = _option("Neighbors in a row that become zero together, such as 4.")
    rank: int | None = _option("Rank of the low-rank factors.")
    outliers: float | None = _option("Share of weights that keep their values beside the grid or table.")
    table: str | None = _option("Table of values: fp4, fp6, fp8, nf2, nf3 or nf4.")
    vector_length: int | None = _option("Outputs whose weights form one vector of the codebook.")
    books: int | None = _option("Codebooks whose entries are added.")
    act_order: bool | None = _option("Solve columns by falling E[x²].")
    damping: float | None = _option("Share of the curvature's mean eigenvalue that is added to its diagonal.")
    input_bits: int | None = _option("Bits that a loader rounds each token's inputs to, 2 to 8; none by default.")
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)  # of registered constraints and solvers

    def given(self) -> dict[str, Any]:
        """Return the options that are given, by name."""
        known = {name: value for name, value in vars(self).items() if name != "own" and value is not None}
        return {**known, **self.own}

    def over(self, defaults: "Options") -> "Options":
        """Return these options where given, and `defaults` elsewhere."""
        return options_of({**defaults.given(), **self.given()})


KNOWN = tuple(known for known in fields(Options) if known.name != "own")


def options_of(given: Mapping[str, Any]) -> Options:
    """Return `Options` from values by name; names that Hesse does not know are `own` options."""
    known = {option.name for option in KNOWN}
    return Options(
        **{name: value for name, value in given.items() if name in known},
        own={name: value for name, value in given.items() if name not in known},
    )


def parse_settings(texts: Iterable[str]) -> Options:
    """Return options from texts such as "headroom=0.5": true and false, whole and other numbers, or words.

    Raises:
        OptionError: a text has no name or no value.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (sign and value and name.isidentifier()):
            raise OptionError(f"--set is {text!r}, but must be a name and a value such as headroom=0.5")
        given[name] = _value(value)
    return options_of(given)


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def known_option(name: str, default: Any) -> Option:
    """Return one of the `Options` with its default in a method."""
    (known,) = (option for option in KNOWN if option.name == name)
    return Option(name, type_text(known.type).removesuffix(" | None"), default, help_of(name))


def type_text(annotation: Any) -> str:
    """Return a type as a signature shows it."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and a help: one option of a class whose fields are its options."""
    return field(default=default, metadata={"help": help})


def settings_of(kind: type) -> tuple[Option, ...]:
    """Return the options that a dataclass has, its fields with a help, as a row of the table lists them."""
    return tuple(
        Option(
            each.name,
            type_text(each.type).replace("typing.", "").removesuffix(" | None"),
            None if each.default is MISSING else each.default,
            help,
        )
        for each in fields(kind)
        if (help := each.metadata.get("help"))
    )


def help_of(name: str) -> str:
    """Return the help of one of the `Options`."""
    return str(Options.__dataclass_fields__[name].metadata["help"])
