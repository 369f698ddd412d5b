"""Update the sizes in modules and configurations after parameters were sliced, and check that they load."""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from fractions import Fraction
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from hesse.networks.families import EXPERT_COUNTS, HEAD_COUNTS, HEAD_MULTIPLES, MODULE_WIDTHS, SLICED_WIDTHS
from hesse.networks.narrow_attention import NarrowAttention, without_nested_tensors
from hesse.partitions.groups import Group


def resize_layers(old: nn.Module, new: nn.Module) -> None:
    """Update the sizes of torch's own layers from the shapes of their weights."""
    for name, module in new.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.modules.conv._ConvNd):
            _resize_convolution(cast(nn.modules.conv._ConvNd, old.get_submodule(name)), module)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = len(weight)
        elif isinstance(module, nn.GroupNorm):
            module.num_groups, module.num_channels = module.num_groups * len(weight) // module.num_channels, len(weight)
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = weight.shape
        elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D: a linear layer, transposed
            module.nx, module.nf = weight.shape


def _resize_convolution(old: nn.modules.conv._ConvNd, new: nn.modules.conv._ConvNd) -> None:
    out, into = new.weight.shape[:2] if not new.transposed else reversed(new.weight.shape[:2])
    if old.groups > 1:
        new.groups = old.groups * new.weight.shape[0] // old.weight.shape[0]
    new.out_channels = out * (new.groups if new.transposed else 1)
    new.in_channels = into * (1 if new.transposed else new.groups)


def resize_widths(old: nn.Module, new: nn.Module) -> None:
    """Update the width and number attributes of feed-forward blocks, experts and routers."""
    before = dict(old.named_modules())
    for name, module in new.named_modules():
        for key, tensor in module.named_parameters():
            was = dict(before[name].named_parameters()).get(key) if name in before and key.count(".") < 2 else None
            for size, left in zip(was.shape, tensor.shape, strict=True) if was is not None else ():
                for attribute in (*MODULE_WIDTHS, "num_experts", "num_local_experts"):
                    if size != left and getattr(before[name], attribute, None) == size:
                        setattr(module, attribute, left)


def resize_heads(old: nn.Module, new: nn.Module, groups: Sequence[Group]) -> None:
    """Update the numbers of heads in attention modules, and in the configurations that the modules read."""
    for names, share in head_shares(old, groups).items():
        place = _parent(names)
        attention = new.get_submodule(place)
        for module in attention.modules():
            if isinstance(module, nn.MultiheadAttention):
                NarrowAttention.convert(module, _scaled(module.num_heads, share))
                continue
            for attribute in (*HEAD_COUNTS, *HEAD_MULTIPLES):
                _scale(module, attribute, share)
            if any(hasattr(getattr(module, "config", None), attribute) for attribute in HEAD_COUNTS):
                module.config = deepcopy(module.config)
                for attribute in HEAD_COUNTS:
                    _scale(module.config, attribute, share)
    without_nested_tensors(new)


def head_shares(model: nn.Module, groups: Sequence[Group]) -> dict[tuple[str, ...], Fraction]:
    """Return the share of heads that remains in each attention module that loses some, by its parameters' names."""
    tensors = dict(model.named_parameters())
    gone: dict[tuple[str, ...], list[Group]] = defaultdict(list)
    for group in groups:
        if group.kind == "heads":
            gone[tuple(sorted({part.parameter for part in group.slices}))].append(group)
    shares = {}
    for names, lost in gone.items():
        first = lost[0].produced[0]
        size = tensors[first.parameter].shape[first.axis]
        shares[names] = Fraction(size - sum(len(group.produced[0].indices) for group in lost), size)
    return shares


def _parent(names: Sequence[str]) -> str:
    """Return the name of the module that holds all of some parameters."""
    if len(names) == 1:
        return names[0].rpartition(".")[0]
    paths = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _scale(thing: object, attribute: str, share: Fraction) -> None:
    value = getattr(thing, attribute, None)
    if type(value) is int and value > 1:
        setattr(thing, attribute, _scaled(value, share))


def _scaled(value: int, share: Fraction) -> int:
    return int(value * share)


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
