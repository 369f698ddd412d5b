"""Solvers as a recipe says them."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field, field_validator

from hesse.methods.strict import Strict
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
    """Which solver, and its options.

    `damping` is a share of the mean eigenvalue of the curvature, or of a Kronecker's factor of the inputs,
    `output_damping` of that of its factor of the outputs.
    """

    name: str
    damping: float = Field(default=0.01, ge=0, le=1e4, allow_inf_nan=False)
    output_damping: float = Field(default=0.3, ge=0, le=1e4, allow_inf_nan=False)
    order: Literal["given", "descending"] = "given"

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SOLVERS:
            raise ValueError(f"there is no solver {name!r}; there are {', '.join(SOLVERS)}")
        return name

    def build(self) -> Solver:
        """The solver."""
        return SOLVERS[self.name](self)


SOLVERS: dict[str, Callable[[SolverOptions], Solver]] = {
    "nearest": lambda _: Nearest(),
    "error_feedback": lambda options: ErrorFeedback(order=options.order),
    "two_sided_feedback": lambda _: TwoSidedFeedback(),
    "greedy_surgeon": lambda _: GreedySurgeon(),
    "surgeon_at_once": lambda _: SummedSurgeon(),
    "surgeon_in_steps": lambda _: StepwiseSurgeon(steps=4),
    "admm": lambda _: ADMM(),
    "whitened_svd": lambda _: WhitenedSVD(),
    "activation_aware": lambda _: ActivationAware(),
    "incoherent": lambda options: Incoherent(ErrorFeedback(order=options.order)),
    "cheaper_side": lambda options: CheaperSide(ErrorFeedback(order=options.order)),
    "cheaper_plain_side": lambda _: CheaperSide(),
    "refit_salient": lambda _: RefitSalient(),
    "salient_bits": lambda options: SalientBits(ErrorFeedback(order=options.order)),
    "vector_feedback": lambda options: VectorFeedback(order=options.order),
    "learned_rounding": lambda options: LearnedRounding(ErrorFeedback(order=options.order)),
    "learned_two_sided": lambda _: LearnedRounding(TwoSidedFeedback()),
    "rows_and_columns": lambda _: RowsAndColumns(),
    "repair": lambda options: Repair(ErrorFeedback(order=options.order), WhitenedSVD()),
    "plain_repair": lambda _: Repair(Nearest(), WhitenedSVD()),
    "alternating": lambda options: Alternating(ErrorFeedback(order=options.order), WhitenedSVD()),
    "plain_alternating": lambda _: Alternating(Nearest(), WhitenedSVD()),
    "feedback_outliers": lambda options: Repair(ErrorFeedback(order=options.order), ADMM()),
    "two_sided_outliers": lambda _: Repair(TwoSidedFeedback(), ADMM()),
    "two_sided_alternating": lambda _: Alternating(TwoSidedFeedback(), WhitenedSVD()),
}
UNDAMPED = ("nearest", "plain_repair", "activation_aware", "cheaper_plain_side", "refit_salient")
# Whose columns have an order.
ORDERED = (
    "error_feedback",
    "repair",
    "feedback_outliers",
    "alternating",
    "incoherent",
    "cheaper_side",
    "salient_bits",
    "vector_feedback",
    "learned_rounding",
)
