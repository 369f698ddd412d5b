"""Linear weights of a model that no command changes, one line a group, with the reason."""

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from hesse.networks.network import Network, reason_to_leave
from hesse.networks.towers import linear_weights, towers

TOGETHER = "all experts of a block in one tensor"
OUTSIDE = "outside the repeated blocks"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def unchanged_notes(network: Network) -> list[str]:
    """Return a note on each group of linear weights that are in no layer of `network`, but for its output head.

    Layers whose names differ in numbers only are a group, and so is a tower.
    """
    apart, notes = set[nn.Module](), list[str]()
    for name, tower in towers(network.model).items():
        apart |= set(tower.modules())
        if weights := linear_weights(tower):
            kind = type(tower).__name__
            notes.append(f"{name}: {weights:,} linear weights stay dense: {kind} sees no text, and is left as it is")
    apart |= {layer.module for layer in network.layers}
    head = network.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    groups: dict[tuple[str, str], list[int]] = {}
    for name, module in network.model.named_modules():
        if module in apart or module is head:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            block = next((b.name for b in network.blocks if name.startswith(f"{b.name}.")), None)
            why = None if block is None else reason_to_leave(name.removeprefix(f"{block}."), module.weight.shape)
            key = _NUMBER.sub("*", name), why or OUTSIDE
            groups.setdefault(key, []).append(module.weight.numel())
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and "xpert" in type(module).__name__:
                groups.setdefault((_NUMBER.sub("*", f"{name}.{part}"), TOGETHER), []).append(parameter.numel())
    return [*notes, *(f"{name}: {sum(own):,} linear weights stay dense: {why}" for (name, why), own in groups.items())]
