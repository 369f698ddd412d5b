"""A recipe: which curvature, constraint and solver for each layer; what `--recipe` reads, `--print-recipe` writes."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hesse.constraints import Constraint, Grid, LowRank, Sparse
from hesse.errors import OptionError
from hesse.methods.plain_yaml import read_yaml
from hesse.solvers import ErrorFeedback, Nearest, Solver, TwoSidedFeedback, WhitenedSVD

Whole = Annotated[int, Field(ge=-(2**31), le=2**31)]  # what a message can print; what has a meaning is checked later


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GridOptions(_Strict):
    """Options of a Grid."""

    bits: Whole = 4
    group_size: Whole = 128
    symmetric: bool = True
    headroom: float = 0.0
    signed: bool = False


class SparseOptions(_Strict):
    """Options of a Sparse: a share such as 0.5, or a pattern such as "2:4"."""

    amount: float | str = 0.5
    scope: Literal["layer", "row"] = "layer"


class LowRankOptions(_Strict):
    """Options of a LowRank."""

    rank: Whole = 64


class ConstraintOptions(_Strict):
    """One constraint, or sparse and grid for both at once."""

    grid: GridOptions | None = None
    sparse: SparseOptions | None = None
    low_rank: LowRankOptions | None = None

    def build(self) -> Constraint:
        """The constraint.

        Raises:
            OptionError: there is none, they cannot be joined, or a value has no meaning.
        """
        if self.low_rank is not None:
            if self.grid is not None or self.sparse is not None:
                raise OptionError("low_rank cannot be joined with grid or sparse in one layer")
            return LowRank(self.low_rank.rank)
        grid = Grid(**self.grid.model_dump()) if self.grid is not None else None
        sparse = _sparse(self.sparse) if self.sparse is not None else None
        if grid is not None and sparse is not None:
            return sparse & grid
        if grid is None and sparse is None:
            raise OptionError("a constraint needs one of grid, sparse and low_rank")
        return grid or sparse  # type: ignore[return-value]


class SolverOptions(_Strict):
    """Which solver, and its options.

    `damping` is a share of the Gram's mean eigenvalue (trace / width), `output_damping` of that of a Kronecker's factor
    of the outputs.
    """

    name: Literal["nearest", "error_feedback", "two_sided_feedback", "whitened_svd"]
    damping: float = Field(default=0.01, ge=0, le=1e4, allow_inf_nan=False)
    output_damping: float = Field(default=0.3, ge=0, le=1e4, allow_inf_nan=False)
    order: Literal["given", "descending"] = "given"

    def build(self) -> Solver:
        """The solver."""
        if self.name == "error_feedback":
            return ErrorFeedback(order=self.order)
        if self.name == "two_sided_feedback":
            return TwoSidedFeedback()
        return WhitenedSVD() if self.name == "whitened_svd" else Nearest()


class Rule(_Strict):
    """What is done to the layers whose name matches one of `layers` (shell patterns such as `*.mlp.*`)."""

    layers: tuple[str, ...] = ("*",)
    curvature: Literal["identity", "gram_diagonal", "gram", "kronecker"]
    constraint: ConstraintOptions
    solver: SolverOptions

    @property
    def needs_output_factor(self) -> bool:
        """Whether its curvature is made of all of E[ggᵀ] at a layer's outputs, and not of inputs alone."""
        return self.curvature == "kronecker"


class Recipe(_Strict):
    """Rules, of which the first that matches a layer's name counts, and the layers that are left as they are."""

    method: str = "recipe"
    about: str | None = None  # for people
    rules: tuple[Rule, ...] = Field(min_length=1)
    ignore: tuple[str, ...] = ()

    def rule_for(self, layer: str) -> Rule | None:
        """The rule for the layer of that name, or None to leave it as it is."""
        if any(matches(layer, pattern) for pattern in self.ignore):
            return None
        return next((rule for rule in self.rules if any(matches(layer, p) for p in rule.layers)), None)

    def to_yaml(self) -> str:
        """The recipe as `load_recipe` reads it."""
        text: str = yaml.safe_dump(_plain(self.model_dump(exclude_none=True)), sort_keys=False)
        return text


def matches(layer: str, pattern: str) -> bool:
    """Whether a layer's name, or its end after a dot, matches a shell pattern."""
    return fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}")


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        OptionError: the file is missing, too large or no YAML, or a key or value is not known; the message names it.
    """
    content = read_yaml(path)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise OptionError(f"the recipe {path} is not valid: {explain(error)}") from None
    for rule in recipe.rules:
        rule.constraint.build()
    return recipe


def explain(error: ValidationError) -> str:
    """The first things that are wrong, each with its place, on one line."""
    parts = []
    for problem in error.errors()[:3]:
        place = ".".join(str(part) for part in problem["loc"]) or "the top"
        message = "is not a known key" if problem["type"] == "extra_forbidden" else problem["msg"].lower()
        parts.append(f"{place}: {message}")
    return "; ".join(parts)


def parse_sparsity(text: str | float) -> Sparse:
    """`0.5` as half, `"2:4"` as two kept of every four.

    Raises:
        OptionError: it is neither.
    """
    try:
        if isinstance(text, str) and ":" in text:
            kept, of = text.split(":")
            return Sparse(int(kept), int(of))
        return Sparse(float(text))
    except (ValueError, OverflowError):
        raise OptionError(f"sparsity is {text!r}, but must be a share such as 0.5 or a pattern such as 2:4") from None


def _sparse(options: SparseOptions) -> Sparse:
    parsed = parse_sparsity(options.amount)
    return parsed if parsed.of is not None else Sparse(parsed.amount, scope=options.scope)


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can write."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
