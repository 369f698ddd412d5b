"""Mixture-of-experts layers as separate linear layers, so that each expert's matrices can be observed and changed.

transformers keeps all experts of a block in two 3-D parameters; their checkpoints hold one matrix per expert.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from hesse.networks.families import EXPERT_LAYERS


class LinearExperts(nn.Module):
    """Experts of one block: linear layers `{expert}.{gate, up, down}`, with the forward of the fused module.

    Every expert is called for every batch, possibly with no tokens, so that a pass that stops at each layer reaches the
    same layers in each batch.
    """

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        count, hidden, inner = fused.get_parameter("down_proj").shape
        self.act_fn = cast(Callable[[Tensor], Tensor], fused.act_fn)
        self.names = names
        for expert in range(count):
            gate, up = (nn.Linear(hidden, inner, bias=False, device="meta") for _ in range(2))
            back = nn.Linear(inner, hidden, bias=False, device="meta")
            self.add_module(str(expert), nn.ModuleDict(dict(zip(names, (gate, up, back), strict=True))))
        self.count = count

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return Σ weight · expert(x) over the chosen experts; hidden_states (tokens, hidden), top_k_* (tokens, k)."""
        total = torch.zeros_like(hidden_states)
        for expert in range(self.count):
            layers = self.get_submodule(str(expert))
            assert isinstance(layers, nn.ModuleDict)
            gate, up, down = (layers[name] for name in self.names)
            token, position = torch.where(top_k_index == expert)
            chosen = hidden_states[token]
            result = down(self.act_fn(gate(chosen)) * up(chosen))
            weighted = result * top_k_weights[token, position, None]
            total = total.index_add(0, token, weighted.to(total.dtype))
        return total


def is_fused(module: nn.Module) -> bool:
    """True if `module` holds all experts of a block as `gate_up_proj` (experts, 2·inner, hidden) and `down_proj`."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.ndim == down.ndim == 3):
        return False
    plain = gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
    return plain and not hasattr(module, "gate_up_proj_bias")


def unfuse(model: nn.Module, stored: set[str]) -> None:
    """Replace fused experts in `model` (on the meta device) by LinearExperts with the names that `stored` uses."""
    names = next((n for n in EXPERT_LAYERS if any(f".experts.0.{n[0]}.weight" in key for key in stored)), None)
    if names is None:
        return
    for name, module in list(model.named_modules()):
        if is_fused(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LinearExperts(module, names))
