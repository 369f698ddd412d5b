"""Solvers in a recipe: their registry, and their options."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

from pydantic import Field, field_validator
from torch import Tensor

from hesse.constraints import Constraint
from hesse.curvature import Curvature
from hesse.methods.strict import Strict
from hesse.options import Option, type_text
from hesse.registry import Registry
from hesse.solvers import (
    ADMM,
    ActivationAware,
    Alternating,
    CheaperSide,
    ErrorFeedback,
    GreedySurgeon,
    Incoherent,
    LearnedRounding,
    Nearest,
    RefitSalient,
    Repair,
    RowsAndColumns,
    SalientBits,
    Solver,
    StepwiseSurgeon,
    SummedSurgeon,
    TwoSidedFeedback,
    VectorFeedback,
    WhitenedSVD,
)


class SolverOptions(Strict):
    """Name and options of a solver.

    `damping` is a share of the mean eigenvalue of the curvature, or of a Kronecker's factor of the inputs,
    `output_damping` of that of its factor of the outputs.
    """

    name: str
    damping: float = Field(default=0.01, ge=0, le=1e4, allow_inf_nan=False)
    output_damping: float = Field(default=0.3, ge=0, le=1e4, allow_inf_nan=False)
    order: Literal["given", "descending"] = "given"
    own: dict[str, Any] | None = None  # settings of a registered solver

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SOLVERS:
            raise ValueError(f"there is no solver {name!r}; there are {', '.join(SOLVERS)}")
        return name

    def build(self) -> Solver:
        """Build the solver."""
        return SOLVERS[self.name].build(self)


@dataclass(frozen=True)
class SolverEntry:
    """A solver that rules and methods can name."""

    name: str
    build: Callable[[SolverOptions], Solver]
    ordered: bool = False  # takes columns in a given order, so that `act_order` has a meaning
    settings: tuple[Option, ...] = ()
    damped: bool = True  # depends on the curvature's damping, so that `damping` has a meaning


_ENTRIES = (
    SolverEntry("nearest", lambda _: Nearest(), damped=False),
    SolverEntry("error_feedback", lambda options: ErrorFeedback(order=options.order), ordered=True),
    SolverEntry("two_sided_feedback", lambda _: TwoSidedFeedback()),
    SolverEntry("greedy_surgeon", lambda _: GreedySurgeon()),
    SolverEntry("surgeon_at_once", lambda _: SummedSurgeon()),
    SolverEntry("surgeon_in_steps", lambda _: StepwiseSurgeon(steps=4)),
    SolverEntry("admm", lambda _: ADMM()),
    SolverEntry("whitened_svd", lambda _: WhitenedSVD()),
    SolverEntry("activation_aware", lambda _: ActivationAware(), damped=False),
    SolverEntry("incoherent", lambda options: Incoherent(ErrorFeedback(order=options.order)), ordered=True),
    SolverEntry("cheaper_side", lambda options: CheaperSide(ErrorFeedback(order=options.order)), ordered=True),
    SolverEntry("cheaper_plain_side", lambda _: CheaperSide(), damped=False),
    SolverEntry("refit_salient", lambda _: RefitSalient(), damped=False),
    SolverEntry("salient_bits", lambda options: SalientBits(ErrorFeedback(order=options.order)), ordered=True),
    SolverEntry("vector_feedback", lambda options: VectorFeedback(order=options.order), ordered=True),
    SolverEntry("learned_rounding", lambda options: LearnedRounding(ErrorFeedback(order=options.order)), ordered=True),
    SolverEntry("learned_two_sided", lambda _: LearnedRounding(TwoSidedFeedback())),
    SolverEntry("rows_and_columns", lambda _: RowsAndColumns()),
    SolverEntry("repair", lambda options: Repair(ErrorFeedback(order=options.order), WhitenedSVD()), ordered=True),
    SolverEntry("plain_repair", lambda _: Repair(Nearest(), WhitenedSVD()), damped=False),
    SolverEntry(
        "alternating", lambda options: Alternating(ErrorFeedback(order=options.order), WhitenedSVD()), ordered=True
    ),
    SolverEntry("plain_alternating", lambda _: Alternating(Nearest(), WhitenedSVD())),
    SolverEntry("feedback_outliers", lambda options: Repair(ErrorFeedback(order=options.order), ADMM()), ordered=True),
    SolverEntry("two_sided_outliers", lambda _: Repair(TwoSidedFeedback(), ADMM())),
    SolverEntry("two_sided_alternating", lambda _: Alternating(TwoSidedFeedback(), WhitenedSVD())),
)
SOLVERS = Registry("solver", entries={entry.name: entry for entry in _ENTRIES})

Algorithm = TypeVar("Algorithm", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class FunctionSolver(Solver):
    """A solver made of one function of weight (out, in), curvature and constraint, which returns a weight (out, in).

    What is stored is the member of the constraint nearest to the returned weight.
    """

    algorithm: Callable[..., Tensor]
    settings: tuple[tuple[str, Any], ...]

    def compute(self, state: Curvature, weight: Tensor, constraint: Constraint) -> Any:
        return constraint.encode(self.algorithm(weight, state, constraint, **dict(self.settings)))


def solver(name: str, *, damped: bool = True) -> Callable[[Algorithm], Algorithm]:
    """Register a function `(weight, curvature, constraint) -> weight` as a solver that methods and recipes can name.

    Keyword-only parameters with a default are options of every method with this solver; `Annotated` gives them a help
    text. The method's option `damping` has a meaning if `damped`. A class with `init` and `compute` is registered by
    `SOLVERS.register(name, SolverEntry(name, build))`.

    Example:
        >>> @hesse.methods.solver("halfway", damped=False)
        ... def halfway(weight, curvature, constraint, *, share: Annotated[float, "Share of the way."] = 0.5):
        ...     return weight + share * (constraint.nearest(weight) - weight)

    Raises:
        OptionError: the name is taken.
    """

    def register(algorithm: Algorithm) -> Algorithm:
        entry = SolverEntry(
            name,
            lambda options: FunctionSolver(algorithm, tuple((options.own or {}).items())),
            settings=keyword_settings(algorithm),
            damped=damped,
        )
        SOLVERS.register(name, entry)
        return algorithm

    return register


def keyword_settings(function: Callable[..., Any]) -> tuple[Option, ...]:
    """Return the keyword-only parameters of a function as options."""
    hints = get_type_hints(function, include_extras=True)
    options = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            hint = hints.get(parameter.name, str)
            kind, help = (hint.__origin__, hint.__metadata__[0]) if get_origin(hint) is Annotated else (hint, "")
            options.append(Option(parameter.name, type_text(kind), parameter.default, help or f"{parameter.name}."))
    return tuple(options)
