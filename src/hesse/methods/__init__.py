"""Named triples curvature × constraint × solver, and recipes that say them per layer."""

from collections.abc import Iterable

from hesse.errors import OptionError
from hesse.methods import allocation, blocks, low_rank, networks, pruning, rewriting, rounding, structured, training
from hesse.methods.method import Method, Options
from hesse.methods.recipe import Recipe, Rule, load_recipe
from hesse.methods.row import Row

OF_COMPRESS = {
    "rounding": rounding.METHODS,
    "rewriting": rewriting.METHODS,
    "pruning": pruning.METHODS,
    "low-rank": low_rank.METHODS,
}
METHODS: dict[str, Method] = {method.name: method for family in OF_COMPRESS.values() for method in family}
DEFAULT_METHOD = "kronecker"
# The table of methods, by the pages of the documentation.
FAMILIES: dict[str, tuple[Row, ...]] = {
    **{name: tuple(method.row for method in family) for name, family in OF_COMPRESS.items()},
    "allocation": allocation.ROWS,
    "blocks": blocks.ROWS,
    "networks": networks.ROWS,
    "structured": structured.ROWS,
    "training": training.ROWS,
}
FAMILIES["low-rank"] += low_rank.ROWS
TABLE: tuple[Row, ...] = tuple(row for rows in FAMILIES.values() for row in rows)

__all__ = [
    "DEFAULT_METHOD",
    "FAMILIES",
    "METHODS",
    "TABLE",
    "Method",
    "Options",
    "Recipe",
    "Row",
    "Rule",
    "find_method",
    "find_rows",
    "load_recipe",
]


def find_rows(names: Iterable[str]) -> dict[str, tuple[Row, ...]]:
    """The rows of the table that `names` of families and of methods choose, by family; all of them for none.

    Raises:
        OptionError: a name is neither.
    """
    names = set(names)
    known = {*FAMILIES, *(row.name for row in TABLE)}
    if unknown := sorted(names - known):
        raise OptionError(f"there is no method or family {unknown[0]!r}; families are {', '.join(FAMILIES)}")
    chosen = {
        family: rows if family in names or not names else tuple(row for row in rows if row.name in names)
        for family, rows in FAMILIES.items()
    }
    return {family: rows for family, rows in chosen.items() if rows}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in METHODS:
        raise OptionError(f"there is no method {name!r}; there are {', '.join(METHODS)} (see `hesse methods`)")
    return METHODS[name]
