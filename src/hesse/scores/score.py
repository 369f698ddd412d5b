"""The table of scores: what does changing or removing this part cost?"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hesse.curvature import Curvature
from hesse.errors import OptionError
from hesse.partitions import GROUP_KINDS, GroupParts
from hesse.registry import Registry

WEIGHTS = ("weights",)
PARAMETERS = ("weights", "tiles", "rows", "columns", "layers")  # parts that are tiles of parameters
GROUPS = (*GROUP_KINDS, "groups")  # parts that are traced and can be cut out
BLOCKS = ("blocks",)
CHANGES = ("changes",)  # of each layer, the candidates that may replace its weight

Orders = dict[str, tuple[list[int], list[float]]]  # by site: its groups from the cheapest on, and what each adds
CostFunction = Callable[[Any, Any], Tensor]  # of evidence and a partition


@dataclass(frozen=True, kw_only=True)
class Score(ABC):
    """A named answer to the question what removing, or changing, each part of a partition costs.

    `parts` are the kinds of parts that the score has a meaning for, and `uses` names the curvature that it is made of.
    With `nats` a cost is an increase of the loss, in the loss's unit; costs without it only rank parts.
    """

    name: str
    source: str
    parts: tuple[str, ...]
    uses: str | None = None
    nats: bool = False

    @property
    def help(self) -> str:
        """The definition of the score, in a few sentences."""
        return inspect.cleandoc(type(self).__doc__ or "")

    @abstractmethod
    def cost(self, evidence: Any, partition: Any) -> Tensor:
        """Return the cost of each part alone (parts,)."""

    def costs(self, evidence: Any, partition: Any) -> Tensor:
        """Return the cost of each part alone (parts,).

        Raises:
            OptionError: the score has no meaning for parts of this kind.
        """
        self.check(partition.kind)
        return self.cost(evidence, partition)

    def check(self, kind: str) -> None:
        """Raise OptionError if the score has no meaning for parts of this kind."""
        if kind not in self.parts:
            judges = "a group by what reads it" if self.parts == READ_GROUPS else ", ".join(self.parts)
            fitting = ", ".join(score.name for score in SCORES.values() if kind in score.parts)
            raise OptionError(f"the score {self.name} judges {judges}, not {kind}: choose one of {fitting}")

    def curvature(self, evidence: Any) -> Curvature | None:
        """Return the curvature under which the weights that stay can be refitted; None if the score has none."""
        return None

    def orders(self, evidence: Any, partition: GroupParts, numbers: Mapping[str, int]) -> Orders:
        """Return the order in which the groups of each site would be removed, and what each adds to the cost.

        `numbers` says by site how many groups at least must be ordered; numbers of groups are those in the site.
        """
        costs, result = self.costs(evidence, partition), Orders()
        for site, members in partition.sites.items():
            own = costs[members]
            order: list[int] = own.argsort().tolist()
            result[site] = order, own[order].tolist()
        return result


READ_GROUPS = ("heads", "hidden", "channels", "groups")  # whose readers are layers; an expert's is its router
SCORES: Registry[Score] = Registry(
    "score",
    modules=(
        "hesse.scores.parameters",
        "hesse.scores.surgeon",
        "hesse.scores.blocks",
        "hesse.scores.sensitivities",
    ),
)


@dataclass(frozen=True, kw_only=True)
class FunctionScore(Score):
    """A score that one function gives."""

    function: CostFunction = field(repr=False)

    @property
    def help(self) -> str:
        return inspect.cleandoc(self.function.__doc__ or "")

    def cost(self, evidence: Any, partition: Any) -> Tensor:
        return self.function(evidence, partition)


def register_score(
    name: str,
    *,
    source: str,
    parts: Sequence[str] = (*PARAMETERS, *GROUPS),
    uses: str | None = None,
    nats: bool = False,
) -> Callable[[CostFunction], CostFunction]:
    """Put a function of evidence and a partition into the table of scores; a decorator.

        @register_score("largest", source="this project")
        def largest(evidence: LossEvidence, partition: Partition) -> Tensor:
            weights = evidence.weights(partition)
            return partition.sums({name: weight**4 for name, weight in weights.items()})

    Args:
        name: under which `hesse.prune(method=...)` finds the score.
        source: paper or person.
        parts: kinds of parts that the score has a meaning for.
        uses: the curvature that the score is made of, by name; None for none.
        nats: True if a cost is an increase of the loss.

    Raises:
        OptionError: there is a score of that name.
    """

    def decorate(function: CostFunction) -> CostFunction:
        add_score(FunctionScore(name=name, source=source, parts=tuple(parts), uses=uses, nats=nats, function=function))
        return function

    return decorate


def add_score(score: Score) -> None:
    """Put a score into the table.

    Raises:
        OptionError: there is one of that name.
    """
    SCORES.register(score.name, score)


def find_score(name: str, kind: str | None = None) -> Score:
    """Return the score of that name, for parts of some kind.

    Raises:
        OptionError: there is none, or it has no meaning for parts of that kind.
    """
    if name not in SCORES:
        fitting = [score.name for score in SCORES.values() if kind is None or kind in score.parts]
        raise OptionError(f"there is no score {name!r}; there are {', '.join(fitting)}")
    if kind is not None:
        SCORES[name].check(kind)
    return SCORES[name]
