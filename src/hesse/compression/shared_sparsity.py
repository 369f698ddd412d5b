"""Rules whose share of zeros is of all their layers together: each layer's own share, by the weights as they are."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from hesse.methods.recipe import Rule
from hesse.models.network import Network
from hesse.planning.sparsity import dropped_by_layer, layer_adaptive_magnitudes, magnitudes

SCORES = {"global": magnitudes, "lamp": layer_adaptive_magnitudes}


def with_own_shares(network: Network, rules: Mapping[str, Rule | None]) -> dict[str, Rule | None]:
    """`rules` with a rule for each layer in place of one whose sparsity has the scope "global" or "lamp".

    Every such layer's weights are read from disk three times, one layer in memory.
    """
    settled = dict(rules)
    sizes = {layer.name: layer.weight.numel() for layer in network.layers}
    for rule in {id(rule): rule for rule in rules.values() if rule is not None}.values():
        sparse = rule.constraint.sparse
        if sparse is None or sparse.scope not in SCORES:
            continue
        names = [name for name, own in rules.items() if own is rule]

        def read(name: str, scope: str) -> Tensor:
            return SCORES[scope](network.checkpoint.read([f"{name}.weight"])[f"{name}.weight"])

        scores = {name: partial(read, name, sparse.scope) for name in names}
        for name, dropped in dropped_by_layer(scores, sparse.build().amount).items():
            share = min(dropped, sizes[name] - 1) / sizes[name]  # one weight stays, or there would be no matrix
            constraint = rule.constraint.model_copy(
                update={"sparse": sparse.model_copy(update={"amount": share, "scope": "layer"})}
            )
            settled[name] = rule.model_copy(update={"constraint": constraint})
    return settled
