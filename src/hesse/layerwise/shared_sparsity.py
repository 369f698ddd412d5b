"""Divide a share of zeros that holds for all layers of a rule into shares per layer, by the present weights."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from hesse.constraints import Sparse
from hesse.methods.recipe import Rule
from hesse.partitions import Tiles
from hesse.scores import StoredWeights, find_score
from hesse.scores.layer_shares import dropped_by_layer

SHARED = {"global": "magnitude", "lamp": "lamp"}  # scope of a sparsity: the score that ranks all layers' weights


def with_own_shares(
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
