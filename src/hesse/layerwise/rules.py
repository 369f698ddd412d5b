"""Which rule each layer gets, settled and checked before anything is computed."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from hesse.constraints import Constraint
from hesse.errors import OptionError, naming
from hesse.estimation.weight_fisher import FisherNeeds
from hesse.layerwise.layer_solver import check_products
from hesse.layerwise.shared_sparsity import with_own_shares
from hesse.methods.curvatures import Statistic
from hesse.methods.recipe import Recipe, Rule, matches

FISHER: tuple[Statistic, ...] = ("fisher diagonal", "fisher blocks", "fisher gradients")  # as in FisherNeeds
Rules = Mapping[str, Rule | None]  # by layer; None for those left as they are


def rules_for(
    recipe: Recipe, weights: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, torch.Size], known: Iterable[str]
) -> dict[str, Rule | None]:
    """The rule of each layer of `shapes` (out, in), whose `weights` are read where shares depend on them.

    `known` are further names that a pattern may match.

    Raises:
        OptionError: a pattern matches nothing, nothing is left to compress, or a constraint does not fit a layer.
        UnsupportedProduct: a rule's curvature lacks what its solver asks for.
    """
    check_patterns(shapes, known, (*recipe.ignore, *(p for rule in recipe.rules for p in rule.layers)))
    rules = {name: recipe.rule_for(name) for name in shapes}
    if not any(rules.values()):
        raise OptionError("no layer is left to compress: ignore fewer, or widen the patterns of the layers to compress")
    for rule in recipe.rules:
        check_products(rule)
    for name, shape in shapes.items():
        fitting(rules[name], name, shape)
    return with_own_shares(weights, shapes, rules)


def fitting(rule: Rule | None, name: str, shape: torch.Size) -> Constraint | None:
    """The constraint of a layer's rule, seen to fit its weight (out, in); None for a layer that is left as it is.

    Raises:
        OptionError: it does not fit; the message names the layer.
    """
    if rule is None:
        return None
    constraint = rule.constraint.build()
    with naming(name):
        constraint.check(shape)
    return constraint


def check_patterns(names: Iterable[str], known: Iterable[str], patterns: Iterable[str]) -> None:
    """Raise OptionError for a pattern that matches neither one of the layers' `names` nor one that is `known`."""
    layers = list(names)
    every = [*layers, *known]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in every):
            raise OptionError(f"the pattern {pattern!r} matches no layer of this model; a layer's name is {layers[0]}")


def whole_factors(rules: Rules) -> set[str]:
    """The layers whose rule needs all of E[ggᵀ] at their outputs."""
    return _needing(rules, "output factor")


def fisher_needs(rules: Rules) -> FisherNeeds:
    """The layers whose rule needs the Fisher on their weights."""
    return FisherNeeds(*(_needing(rules, kind) for kind in FISHER))


def reads_inputs(rules: Rules) -> bool:
    """Whether a rule needs the inputs of its layers."""
    return bool(_needing(rules, "inputs"))


def weighted_inputs(rules: Rules) -> set[str]:
    """The layers whose rule weighs the positions of its layers' inputs."""
    return _needing(rules, "weighted inputs")


def attention_outputs(rules: Rules) -> set[str]:
    """The layers whose rule asks what the output of their attention feels of them."""
    return _needing(rules, "attention factor")


def statistics_needed(rules: Rules) -> dict[str, set[str]]:
    """Return the statistics that each layer with a rule needs, besides those of the backward pass.

    All need the Gram of their inputs, from which a change is predicted. One rule that rounds inputs makes all layers
    need the peaks of theirs.
    """
    rounded = any(rule is not None and rule.input_bits for rule in rules.values())
    always = {"inputs", *(("input peaks",) if rounded else ())}
    asked = {"weighted inputs", "attention factor"}
    return {name: always | (asked & rule.kind.needs) for name, rule in rules.items() if rule is not None}


def _needing(rules: Rules, statistic: Statistic) -> set[str]:
    return {name for name, rule in rules.items() if rule is not None and statistic in rule.kind.needs}
