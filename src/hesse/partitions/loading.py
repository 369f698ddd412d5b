"""Check that transformers can save and load a sliced network, and write its sizes into the configuration."""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from hesse.networks.families import EXPERT_COUNTS, HEAD_COUNTS, SLICED_WIDTHS
from hesse.partitions.attributes import head_shares
from hesse.partitions.groups import Group


def loading_problem(model: nn.Module) -> str | None:
    """Return the reason why `from_pretrained` could not load the saved network; None if it could."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return f"{type(model).__name__} has no configuration: keep it with torch.save"
    return _mismatch(model, config)


def _mismatch(model: nn.Module, config: Any) -> str | None:
    """Return the first difference in shape between the model and one built from its configuration; None if equal."""
    try:
        with torch.device("meta"):
            built = type(model)(deepcopy(config))
    except (ValueError, ZeroDivisionError, RuntimeError, AssertionError) as error:
        return f"its configuration has no such sizes: {str(error).splitlines()[0]}"
    shapes = {name: p.shape for name, p in built.named_parameters()}
    for name, parameter in model.named_parameters():
        if shapes.get(name) != parameter.shape:
            known = "no such parameter" if name not in shapes else f"{tuple(shapes[name])} there"
            return f"its configuration cannot say that {name} is {tuple(parameter.shape)} ({known})"
    return None


def describe_in_config(old: nn.Module, new: nn.Module, groups: Sequence[Group]) -> None:
    """Set the sizes in the configuration of `new`, if a configuration can express them."""
    config = getattr(old, "config", None)
    if config is None or not hasattr(old, "save_pretrained"):
        return
    wanted = deepcopy(config)
    _set_heads(wanted, old, groups)
    _set_widths(wanted, old, groups)
    if _mismatch(new, wanted) is None:
        for module in new.modules():
            if isinstance(getattr(module, "config", None), type(config)):
                module.config = wanted


def _set_heads(config: Any, old: nn.Module, groups: Sequence[Group]) -> None:
    shares = set(head_shares(old, groups).values())
    if len(shares) != 1:
        return
    (share,) = shares
    if getattr(config, "head_dim", None) is None and getattr(config, "hidden_size", None):
        config.head_dim = config.hidden_size // config.num_attention_heads
    for attribute in HEAD_COUNTS:
        if attribute in config.to_dict() and isinstance(getattr(config, attribute), int):
            setattr(config, attribute, int(getattr(config, attribute) * share))


def _set_widths(config: Any, old: nn.Module, groups: Sequence[Group]) -> None:
    """Set the configuration's numbers of hidden units and experts that changed equally everywhere."""
    tensors = dict(old.named_parameters())
    lost: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        lost[group.kind, group.site].append(group)
    changes: dict[tuple[str, int], set[int]] = defaultdict(set)
    for (kind, _), gone in lost.items():
        first = gone[0].produced[0]
        size = tensors[first.parameter].shape[first.axis] // len(first.indices)
        changes[kind, size].add(size - len(gone))
    for kind, attribute in [("hidden", name) for name in SLICED_WIDTHS] + [("experts", name) for name in EXPERT_COUNTS]:
        value = getattr(config, attribute, None)
        if attribute == "n_inner" and value is None and hasattr(config, "n_inner"):
            value = 4 * config.hidden_size
        left = changes[kind, value] if isinstance(value, int) else set()
        if len(left) == 1:
            setattr(config, attribute, next(iter(left)))
