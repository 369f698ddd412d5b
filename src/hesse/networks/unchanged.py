"""Linear weights of a model that no command changes, one line a group, with the reason."""

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from hesse.networks.network import Network, reason_to_leave
from hesse.networks.towers import linear_weights, towers

TOGETHER = "all experts of a block in one tensor"
OUTSIDE = "outside the repeated blocks"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def unchanged_weights(network: Network) -> dict[tuple[str, str], int]:
    """Return the linear weights that are in no layer of `network`, but for its output head: by name and reason.

    Layers whose names differ in numbers only are a group, and so is a tower.
    """
    apart, groups = set[nn.Module](), dict[tuple[str, str], int]()
    for name, tower in towers(network.model).items():
        apart |= set(tower.modules())
        if weights := linear_weights(tower):
            groups[name, f"{type(tower).__name__} sees no text, and is left as it is"] = weights
    apart |= {layer.module for layer in network.layers}
    head = network.model.get_output_embeddings()  # type: ignore[no-untyped-call]

    def count(name: str, why: str, weights: int) -> None:
        key = _NUMBER.sub("*", name), why
        groups[key] = groups.get(key, 0) + weights

    for name, module in network.model.named_modules():
        if module in apart or module is head:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            block = next((b.name for b in network.blocks if name.startswith(f"{b.name}.")), None)
            why = None if block is None else reason_to_leave(name.removeprefix(f"{block}."), module.weight.shape)
            count(name, why or OUTSIDE, module.weight.numel())
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and "xpert" in type(module).__name__:
                count(f"{name}.{part}", TOGETHER, parameter.numel())
    return groups


def unchanged_notes(network: Network) -> list[str]:
    """Return a note on each group of `unchanged_weights`."""
    groups = unchanged_weights(network)
    return [f"{name}: {weights:,} linear weights stay dense: {why}" for (name, why), weights in groups.items()]
