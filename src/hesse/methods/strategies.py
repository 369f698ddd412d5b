"""Strategies: the ways to choose which parts of a model are removed, which rows name as their solver."""

from typing import Any

from hesse.registry import Registry

# Dataclasses whose fields are their options; the modules that define them register them, on first use.
STRATEGIES: Registry[type[Any]] = Registry(
    "strategy",
    modules=(
        "hesse.modules.weight_ranking",
        "hesse.modules.group_ranking",
        "hesse.modules.loss_tolerance",
        "hesse.modules.only_train_once",
        "hesse.modules.head_dimensions",
        "hesse.jobs.block_strategies",
        "hesse.jobs.prune_hidden",
    ),
)
