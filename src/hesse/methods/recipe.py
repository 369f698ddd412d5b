"""Recipes: curvature, constraint and solver of each layer, as `--recipe` reads and `--print-recipe` writes them."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from hesse.errors import OptionError
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.curvatures import CURVATURES, CurvatureKind
from hesse.methods.patterns import matches
from hesse.methods.plain_yaml import read_yaml
from hesse.methods.solver_options import SolverOptions
from hesse.methods.strict import Strict

# Rewritings by `hesse.rewriting`, which change a model before it is rounded without changing its function.
Rewrite = Literal["hadamard", "kurtail", "activation_aware", "smoothing", "outlier_smoothing"]


class Rule(Strict):
    """Rule for the layers whose name matches one of `layers` (patterns such as `*.mlp.*`)."""

    layers: tuple[str, ...] = ("*",)
    curvature: str
    constraint: ConstraintOptions
    solver: SolverOptions
    input_bits: int | None = Field(default=None, ge=2, le=8)  # a loader rounds each token's inputs to these bits

    @field_validator("curvature")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CURVATURES:
            raise ValueError(f"there is no curvature {name!r}; there are {', '.join(CURVATURES)}")
        return name

    @property
    def kind(self) -> CurvatureKind:
        """Return the rule's curvature."""
        return CURVATURES[self.curvature]


class Recipe(Strict):
    """Recipe of a model: the first rule that matches a layer's name applies; ignored layers are unchanged."""

    method: str = "recipe"
    about: str | None = None  # for people
    rules: tuple[Rule, ...] = Field(min_length=1)
    ignore: tuple[str, ...] = ()
    rewrite: Rewrite | None = None  # a rewriting of the model before the rules, which keeps its function

    def rule_for(self, layer: str) -> Rule | None:
        """Return the rule for the layer of that name; None leaves it unchanged."""
        if any(matches(layer, pattern) for pattern in self.ignore):
            return None
        return next((rule for rule in self.rules if any(matches(layer, p) for p in rule.layers)), None)

    def to_yaml(self) -> str:
        """Return the recipe as `load_recipe` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


def load_recipe(path: Path) -> Recipe:
    """Load the recipe in a YAML file.

    Raises:
        OptionError: the file is missing, too large or not YAML, or has an unknown key or value; the message names it.
    """
    try:
        recipe = Recipe.model_validate(read_yaml(path))
    except ValidationError as error:
        raise OptionError(f"the recipe {path} is not valid: {explain(error)}") from None
    for rule in recipe.rules:
        rule.constraint.build()
    return recipe


def explain(error: ValidationError) -> str:
    """Return the first problems, each with its place, on one line."""
    parts, problems = [], error.errors()
    inside = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    for problem in [each for each in problems if each["loc"] not in inside][:3]:  # the innermost problems only
        place = ".".join(str(part) for part in problem["loc"]) or "the top"
        message = "is not a known key" if problem["type"] == "extra_forbidden" else problem["msg"].lower()
        parts.append(f"{place}: {message}")
    return "; ".join(parts)
