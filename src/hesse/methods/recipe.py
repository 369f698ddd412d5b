"""A recipe: which curvature, constraint and solver for each layer; what `--recipe` reads, `--print-recipe` writes."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from hesse.errors import OptionError
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.curvatures import CURVATURES, CurvatureKind
from hesse.methods.plain_yaml import read_yaml
from hesse.methods.solver_options import SolverOptions
from hesse.methods.strict import Strict

# What `hesse.rewriting` does to a model before it is rounded, its function unchanged.
Rewrite = Literal["hadamard", "kurtail", "activation_aware", "smoothing", "outlier_smoothing"]


class Rule(Strict):
    """What is done to the layers whose name matches one of `layers` (shell patterns such as `*.mlp.*`)."""

    layers: tuple[str, ...] = ("*",)
    curvature: str
    constraint: ConstraintOptions
    solver: SolverOptions
    input_bits: int | None = Field(default=None, ge=2, le=8)  # that a loader rounds each token's inputs to

    @field_validator("curvature")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CURVATURES:
            raise ValueError(f"there is no curvature {name!r}; there are {', '.join(CURVATURES)}")
        return name

    @property
    def kind(self) -> CurvatureKind:
        """Its curvature."""
        return CURVATURES[self.curvature]


class Recipe(Strict):
    """Rules, of which the first that matches a layer's name counts, and the layers that are left as they are."""

    method: str = "recipe"
    about: str | None = None  # for people
    rules: tuple[Rule, ...] = Field(min_length=1)
    ignore: tuple[str, ...] = ()
    rewrite: Rewrite | None = None  # what is done to the model before, its function unchanged

    def rule_for(self, layer: str) -> Rule | None:
        """The rule for the layer of that name, or None to leave it as it is."""
        if any(matches(layer, pattern) for pattern in self.ignore):
            return None
        return next((rule for rule in self.rules if any(matches(layer, p) for p in rule.layers)), None)

    def to_yaml(self) -> str:
        """The recipe as `load_recipe` reads it."""
        return yaml.safe_dump(_plain(self.model_dump(exclude_none=True)), sort_keys=False)


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
    problems = error.errors()
    inside = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    for problem in [each for each in problems if each["loc"] not in inside][:3]:  # what holds a wrong part is right
        place = ".".join(str(part) for part in problem["loc"]) or "the top"
        message = "is not a known key" if problem["type"] == "extra_forbidden" else problem["msg"].lower()
        parts.append(f"{place}: {message}")
    return "; ".join(parts)


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can write."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
