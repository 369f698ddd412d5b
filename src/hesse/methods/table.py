"""Table of methods: all rows, from all packages."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hesse.errors import OptionError
from hesse.methods.method import Method
from hesse.methods.verbs import VERBS
from hesse.registry import Registry

DEFAULT_METHOD = "kronecker"
# The pages of the documentation, in the order of the table; methods of other packages come after them.
METHOD_FAMILIES = (
    "rounding",
    "rewriting",
    "pruning",
    "low-rank",
    "allocation",
    "blocks",
    "networks",
    "structured",
    "training",
)
METHODS: Registry[Method] = Registry(
    "method",
    modules=(
        "hesse.methods.rounding",
        "hesse.methods.rewriting",
        "hesse.methods.pruning",
        "hesse.methods.low_rank",
        "hesse.planning.rows",
        "hesse.methods.blocks",
        "hesse.methods.networks",
        "hesse.methods.structured",
        "hesse.training.rows",
    ),
)


def register(*methods: Method, family: str = "own") -> None:
    """Add methods to the table, to `hesse methods`, and to the verbs that run them.

    Raises:
        OptionError: a name is taken, or a method names a curvature, constraint or solver that is not registered.
    """
    for method in methods:
        if family not in METHOD_FAMILIES:
            method.check()
        METHODS.register(method.name, replace(method, family=family))


def methods_of(verb: str) -> dict[str, Method]:
    """Return the methods that a verb runs."""
    return {name: method for name, method in METHODS.items() if method.verb == verb}


def find_method(name: str, *verbs: str) -> Method:
    """Return the method of that name, which one of `verbs` must run if any is given.

    Raises:
        OptionError: there is no such method, or another verb runs it, or the same function with more options.
    """
    if name not in METHODS:
        known = [method.name for method in METHODS.values() if not verbs or method.verb in verbs]
        raise OptionError(f"there is no method {name!r}; there are {', '.join(known)} (see `hesse methods`)")
    method = METHODS[name]
    if verbs and method.verb not in verbs:
        given = [word for word in method.example.split() if word.startswith("--")]
        if "--method" in given and VERBS[method.verb].function in {VERBS[verb].function for verb in verbs}:
            needed = " and ".join(option for option in given if option != "--method")
            raise OptionError(f"the method {name} needs {needed}: {method.example}")
        raise OptionError(f"the method {name} does not run by {' or '.join(verbs)}: it runs by {method.example}")
    return method


def find_row(name: str, rows: Mapping[str, Method]) -> Method | None:
    """Return the row of that name, with or without "-groups"; None if there is none.

    A name in full comes first: "magnitude" is the row of single weights where `rows` has both.
    """
    return rows.get(name) or rows.get(f"{name}-groups")


def find_methods(names: Iterable[str]) -> dict[str, tuple[Method, ...]]:
    """Return the rows that `names` of families and of methods choose, by family; all of them for no name.

    Methods that prune groups are found with or without "-groups" in their names.

    Raises:
        OptionError: a name is neither a family nor a method.
    """
    names = set(names)
    families: dict[str, list[Method]] = {family: [] for family in METHOD_FAMILIES}
    for method in METHODS.values():
        families.setdefault(method.family, []).append(method)
    rows = {name: find_row(name, METHODS) for name in names}
    if unknown := sorted(name for name, row in rows.items() if row is None and name not in families):
        raise OptionError(f"there is no method or family {unknown[0]!r}; families are {', '.join(families)}")
    chosen = {
        family: tuple(method for method in methods if not names or family in names or method in rows.values())
        for family, methods in families.items()
    }
    return {family: methods for family, methods in chosen.items() if methods}
