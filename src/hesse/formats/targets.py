"""Targets: the layers that each loader supports, and the layers that it fuses."""

import torch

from hesse.constraints import Constraint, Grid, LowRank, SparseGrid
from hesse.errors import OptionError
from hesse.networks.families import EXPERT_PATTERN, READ_AS_ONE, expert_number
from hesse.networks.network import Layer, Network

TARGETS = ("transformers", "vllm", "any")
VLLM_GROUPS = (-1, 32, 64, 128)  # columns per scale that its kernels support


def check_target(target: str) -> None:
    """Raise OptionError if there is no such target."""
    if target not in TARGETS:
        raise OptionError(f"there is no target {target!r}; there are {', '.join(TARGETS)}")


def fused_groups(layers: list[Layer], one_scheme: bool) -> dict[str, list[Layer]]:
    """Group the layers that need one scheme: queries, keys and values; gate and up; all experts. Keys name the groups.

    The experts of all blocks form one group, because transformers loads them together; with `one_scheme` all other
    layers form one group too.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        fused = next((names for names in READ_AS_ONE if leaf in names), (leaf,))
        name = "*" if one_scheme else f"{parent}.{'+'.join(fused)}"
        name = EXPERT_PATTERN if expert_number(layer.name) else name
        groups.setdefault(name, []).append(layer)
    return groups


def refusal(target: str, constraint: Constraint | None, shape: torch.Size, transposed: bool) -> str | None:
    """Return the reason why `target` cannot load a layer of `shape` (out, in) under `constraint`; None if it can."""
    if isinstance(constraint, LowRank):
        return None if target == "any" else "it needs model code for factorised layers (--target any)"
    grid = constraint.grid if isinstance(constraint, SparseGrid) else constraint
    if target != "vllm" or not isinstance(grid, Grid):
        return None
    if transposed:
        return "it does not read packed weights that are stored as (in, out)"
    if grid.group_size not in VLLM_GROUPS:
        return f"it supports groups of 32, 64 and 128 and whole rows (-1), not of {grid.group_size}"
    if grid.group_size != -1 and shape[1] % grid.group_size:
        return f"groups of {grid.group_size} do not divide a width of {shape[1]}"
    if not grid.symmetric and shape[0] * grid.bits % 32:
        return f"zero points of {shape[0]} rows with {grid.bits} bits do not fill whole words"
    return None


def check_inputs(target: str, layer: str, constraint: Constraint | None, input_bits: int | None) -> None:
    """Check that the loader `target` supports rounded inputs for a layer.

    Raises:
        OptionError: it does not; the message names the layer.
    """
    if target != "vllm" or input_bits is None:
        return
    served = isinstance(constraint, Grid) and (constraint.bits, constraint.group_size, input_bits) == (8, -1, 8)
    if not served:
        raise OptionError(
            f"{layer}: vllm rounds inputs only to 8 bits, and only for weights of 8 bits with one scale per row: use "
            "--bits 8 --group-size -1 --input-bits 8"
        )


def check_served(target: str, network: Network, constraints: dict[str, Constraint | None]) -> None:
    """Check that the loader `target` supports every layer of a recipe.

    Raises:
        OptionError: it does not support a layer's constraint, or fuses layers whose constraints differ; the message
            names the layer.
    """
    check_target(target)
    for layer in network.layers:
        reason = refusal(target, constraints[layer.name], layer.weight.shape, layer.transposed)
        if reason is not None:
            raise OptionError(f"{layer.name}: {target} does not support {constraints[layer.name]}: {reason}")
    if target != "vllm":
        return
    for layers in fused_groups(network.layers, one_scheme=False).values():
        first = layers[0].name
        other = next((layer.name for layer in layers if constraints[layer.name] != constraints[first]), None)
        if other is not None:
            raise OptionError(f"{first} and {other}: vllm fuses them, so they need one rule")
