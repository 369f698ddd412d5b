"""Strategies: the ways to choose which parts of a model are removed, which rows name as their solver."""

from typing import Any

from hesse.registry import Registry

# Dataclasses whose fields are their options. The modules of verbs that run them add them, on first use.
STRATEGIES: Registry[type[Any]] = Registry("strategy", modules=("hesse.modules.prune", "hesse.jobs.prune"))
