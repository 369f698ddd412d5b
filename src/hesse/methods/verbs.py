"""Verbs: the functions of `hesse` that run methods."""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from hesse.registry import Registry


@dataclass(frozen=True)
class Verb:
    """A function that runs methods, as `function` of the package, which gets a method's name as `keyword`.

    `solvers` is the registry of its methods' solvers, by module and name, imported on first use; None for a verb with a
    single algorithm.

    `takes_options` is False for a verb that chooses the options of its methods' constraints and solvers itself.

    `example` is the call or command that the table shows, with {name} for the method's. A verb without `keyword` runs
    one method only.
    """

    name: str
    function: str  # such as "hesse:compress"
    example: str
    keyword: str | None = "method"
    solvers: str | None = "hesse.methods:SOLVERS"
    takes_options: bool = True

    def solver(self, name: str) -> Any:
        """Return the entry of a solver that the verb's methods can name.

        Raises:
            OptionError: there is no such solver.
        """
        if self.solvers is None:
            return None
        table: Registry[Any] = resolve_name(self.solvers)
        return table.find(name)

    def run(self, method: str, /, *arguments: Any, **options: Any) -> Any:
        """Call the function for a method."""
        function: Callable[..., Any] = resolve_name(self.function)
        named = {} if self.keyword is None else {self.keyword: method}
        return function(*arguments, **named, **options)


_VERBS = (
    Verb("compress", "hesse:compress", "hesse compress MODEL OUT --method {name}"),
    Verb("repair", "hesse:repair", "hesse repair DENSE COMPRESSED OUT", keyword=None),
    Verb(
        "compress_to_size",
        "hesse:compress",
        "hesse compress MODEL OUT --method {name} --size 60% --statistics STATISTICS",
        takes_options=False,
    ),
    Verb(
        "prune_gradually",
        "hesse:prune_gradually",
        'hesse.prune_gradually(model, data, training, 0.9, loss_function=loss, method="{name}")',
    ),
    Verb(
        "finetune",
        "hesse:finetune",
        'hesse.finetune(model, data, training, loss_function=loss, method="{name}")',
        solvers="hesse.training.trainings:TRAININGS",
    ),
    Verb(
        "allocate",
        "hesse:compress",
        "hesse compress MODEL OUT --size 40% --allocation {name}",
        keyword="allocation",
        solvers="hesse.planning.planners:PLANNERS",
    ),
    Verb(
        "price",
        "hesse.planning:price",
        'hesse.planning.price(objective, menu, "{name}").choose(limit)',
        keyword="method",
        solvers="hesse.planning.planners:PLANNERS",
    ),
    Verb(
        "plan_tiles",
        "hesse.planning:plan_tiles",
        "hesse.planning.plan_tiles(objective, kept)",
        solvers="hesse.planning.planners:PLANNERS",
    ),
    Verb(
        "prune",
        "hesse:prune",
        'hesse.prune(model, data=data, what="{what}", method="{name}")',
        solvers="hesse.methods.strategies:STRATEGIES",
    ),
    Verb(
        "prune_checkpoint",
        "hesse:prune",
        "hesse prune MODEL OUT --what {what} --method {name} --keep 0.75",
        solvers="hesse.methods.strategies:STRATEGIES",
    ),
)
VERBS = Registry("verb", entries={verb.name: verb for verb in _VERBS})
