"""Rules whose share of zeros is of all their layers together: each layer's own share, by the weights as they are."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from hesse.constraints import Constraint, Sparse
from hesse.errors import HesseError
from hesse.methods.recipe import Rule
from hesse.models.network import Layer, Network
from hesse.planning.sparsity import dropped_by_layer, layer_adaptive_magnitudes, magnitudes

SCORES = {"global": magnitudes, "lamp": layer_adaptive_magnitudes}


def with_own_shares(network: Network, rules: Mapping[str, Rule | None]) -> dict[str, Rule | None]:
    """`rules` with a rule for each layer in place of one whose sparsity has the scope "global" or "lamp".

    Every such layer's weights are read from disk three times, one layer in memory.
    """
    settled = dict(rules)
    layers = {layer.name: layer for layer in network.layers}
    for rule in {id(rule): rule for rule in rules.values() if rule is not None}.values():
        sparse = rule.constraint.sparse
        if sparse is None or sparse.scope not in SCORES:
            continue
        chosen = [layers[name] for name, own in rules.items() if own is rule]
        built = sparse.build()
        for layer in chosen:
            check_shape(layer, built)
        scores = {layer.name: partial(_scores, network, layer, built, sparse.scope) for layer in chosen}
        for name, dropped in dropped_by_layer(scores, built.amount).items():
            number = layers[name].weight.numel() // built.block
            share = min(dropped, number - 1) / number  # something stays, or there would be no matrix
            constraint = rule.constraint.model_copy(
                update={"sparse": sparse.model_copy(update={"amount": share, "scope": "layer"})}
            )
            settled[name] = rule.model_copy(update={"constraint": constraint})
    return settled


def check_shape(layer: Layer, constraint: Constraint) -> None:
    """Raise an error that names the layer, if its weight cannot be constrained in this way."""
    try:
        constraint.check(layer.weight.shape)
    except HesseError as error:
        raise type(error)(f"{layer.name}: {error}") from None


def _scores(network: Network, layer: Layer, sparse: Sparse, scope: str) -> Tensor:
    """Of the layer's weights, or of its blocks, whose magnitude is their norm."""
    weight = network.checkpoint.read([f"{layer.name}.weight"])[f"{layer.name}.weight"].float()
    if sparse.block > 1:
        weight = sparse.of_blocks((weight.T if layer.transposed else weight).square()).sqrt()
    return SCORES[scope](weight)
