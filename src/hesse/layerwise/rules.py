"""Assign a rule to each layer, and check it before anything is computed."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hesse.constraints import Constraint, Sparse
from hesse.errors import OptionError, naming
from hesse.estimation.statistics import STATISTICS, BackwardStatistic
from hesse.layerwise.layer_solver import check_products
from hesse.methods.patterns import matches
from hesse.methods.recipe import Recipe, Rule
from hesse.networks.network import Layer
from hesse.partitions import Tiles
from hesse.scores import StoredWeights, find_score
from hesse.scores.layer_shares import dropped_by_layer

SHARED = {"global": "magnitude", "lamp": "lamp"}  # scope of a sparsity: the score that ranks all layers' weights
Rules = Mapping[str, Rule | None]  # by layer; None for unchanged layers


def rules_for(
    recipe: Recipe, weights: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, torch.Size], known: Iterable[str]
) -> dict[str, Rule | None]:
    """Return the rule of each layer of `shapes` (out, in); `weights` are read if shares of zeros depend on them.

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
    return _with_own_shares(weights, shapes, rules)


def layer_rules(recipe: Recipe, layers: Iterable[Layer], model: nn.Module) -> dict[str, Rule | None]:
    """Return the rule of each of the `layers` of a model in memory; as `rules_for`."""
    weights = {layer.name: partial(_weight, layer) for layer in layers}
    shapes = {name: read().shape for name, read in weights.items()}
    return rules_for(recipe, weights, shapes, (name for name, _ in model.named_modules()))


def _weight(layer: Layer) -> Tensor:
    return layer.weight.detach()


def fitting(rule: Rule | None, name: str, shape: torch.Size) -> Constraint | None:
    """Return the constraint of a layer's rule, checked against the weight's shape (out, in); None without a rule.

    Raises:
        OptionError: it does not fit the shape; the message names the layer.
    """
    if rule is None:
        return None
    constraint = rule.constraint.build()
    with naming(name):
        constraint.check(shape)
    return constraint


def check_patterns(names: Iterable[str], known: Iterable[str], patterns: Iterable[str]) -> None:
    """Raise OptionError for a pattern that matches none of the layers' `names` and none of the `known` names."""
    layers = list(names)
    every = [*layers, *known]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in every):
            raise OptionError(f"the pattern {pattern!r} matches no layer of this model; a layer's name is {layers[0]}")


def statistics_needed(rules: Rules) -> dict[str, frozenset[str]]:
    """Return the names of the statistics that each layer with a rule needs: its curvature's, and a prediction's.

    Predictions need the Gram of the inputs and the output factor, or its diagonal. If one rule rounds inputs, all
    layers need the peaks of their inputs.

    Raises:
        OptionError: a curvature needs a statistic that does not exist.
    """
    peaks = frozenset({"input peaks"} if any(rule is not None and rule.input_bits for rule in rules.values()) else ())
    needs = {}
    for layer, rule in rules.items():
        if rule is not None:
            own = rule.kind.needs
            for name in own:
                STATISTICS.find(name)
            needs[layer] = own | peaks | {"inputs"} | ({"output diagonal"} if "output factor" not in own else set())
    return needs


def reads_inputs(rules: Rules) -> bool:
    """Return True if the curvature of a rule needs more than backward statistics."""
    kinds = {rule.curvature: rule.kind for rule in rules.values() if rule is not None}.values()
    return any(not isinstance(STATISTICS[name], BackwardStatistic) for kind in kinds for name in kind.needs)


def _with_own_shares(
    weights: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, torch.Size], rules: Mapping[str, Rule | None]
) -> dict[str, Rule | None]:
    """Return `rules` with one rule per layer in place of a rule whose sparsity has the scope "global" or "lamp".

    The weights (out, in) of every such layer are read three times; one layer is in memory.
    """
    settled = dict(rules)
    for rule in {id(rule): rule for rule in rules.values() if rule is not None}.values():
        sparse = rule.constraint.sparse
        if sparse is None or sparse.scope not in SHARED:
            continue
        names = [name for name, own in rules.items() if own is rule]
        built = sparse.build()
        scores = {name: partial(_scores, weights[name], built, sparse.scope) for name in names}
        for name, dropped in dropped_by_layer(scores, built.amount).items():
            number = shapes[name].numel() // built.block
            share = min(dropped, number - 1) / number  # keep at least one weight
            constraint = rule.constraint.model_copy(
                update={"sparse": sparse.model_copy(update={"amount": share, "scope": "layer"})}
            )
            settled[name] = rule.model_copy(update={"constraint": constraint})
    return settled


def _scores(read: Callable[[], Tensor], sparse: Sparse, scope: str) -> Tensor:
    """Return the costs of a layer's weights, or of its blocks, whose magnitude is their norm."""
    weight = read().float()
    weight = sparse.of_blocks(weight.square()).sqrt() if sparse.block > 1 else weight
    return find_score(SHARED[scope]).costs(StoredWeights({"weight": weight}), Tiles({"weight": weight.shape}))
