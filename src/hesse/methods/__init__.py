"""Named triples curvature × constraint × solver, and recipes that say them per layer."""

from hesse.errors import OptionError
from hesse.methods import allocation, blocks, low_rank, networks, pruning, rewriting, rounding, structured, training
from hesse.methods.method import Method, Options
from hesse.methods.recipe import Recipe, Rule, load_recipe
from hesse.methods.row import Row

FAMILIES = (rounding, rewriting, pruning, low_rank)
METHODS: dict[str, Method] = {method.name: method for family in FAMILIES for method in family.METHODS}
DEFAULT_METHOD = "kronecker"
TABLE: tuple[Row, ...] = (
    *(method.row for method in METHODS.values()),
    *allocation.ROWS,
    *blocks.ROWS,
    *low_rank.ROWS,
    *networks.ROWS,
    *structured.ROWS,
    *training.ROWS,
)

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "TABLE",
    "Method",
    "Options",
    "Recipe",
    "Row",
    "Rule",
    "find_method",
    "load_recipe",
]


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in METHODS:
        raise OptionError(f"there is no method {name!r}; there are {', '.join(METHODS)} (see `hesse methods`)")
    return METHODS[name]
