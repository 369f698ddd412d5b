"""Mixture-of-experts layers as separate linear layers, so that each expert's matrices can be observed and changed.

transformers keeps all experts of a block in a few parameters with one matrix per expert. What happens between the
matrices (activation, clamps, the order of gate and up rows) is left to the model's own functions.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from hesse.errors import UnsupportedModelError

NAMES = ("gate_proj", "up_proj", "down_proj")  # of an expert's matrices where the checkpoint does not name them


@dataclass(frozen=True)
class ExpertMatrix:
    """Place of one expert's matrix, or its bias, in a parameter that holds those of all experts."""

    parameter: str
    count: int  # of experts
    expert: int
    rows: tuple[int | None, int | None, int | None]  # of its outputs: start, stop, step
    transposed: bool  # the parameter holds (in, out)

    def of(self, fused: Tensor) -> Tensor:
        """Return the matrix (out, in), or the bias (out), as a view of `fused`."""
        if fused.ndim == 2 and len(fused) == self.count:
            return fused[self.expert, slice(*self.rows)]
        matrix = fused.view(self.count, -1, fused.shape[-1])[self.expert]
        return (matrix.T if self.transposed else matrix)[slice(*self.rows)]


@dataclass(frozen=True)
class ExpertPart:
    """One linear layer of each expert: its name, and where the fused module holds its weights and biases."""

    name: str
    weight: str
    bias: str | None = None
    rows: tuple[int | None, int | None, int | None] = (None, None, None)
    transposed: bool = False

    def places(self, count: int, expert: int) -> dict[str, ExpertMatrix]:
        """Return the places of the weight and the bias, by the names that a linear layer gives them."""
        weight = ExpertMatrix(self.weight, count, expert, self.rows, self.transposed)
        bias = [] if self.bias is None else [("bias", ExpertMatrix(self.bias, count, expert, self.rows, False))]
        return dict([("weight", weight), *bias])


class LinearExperts(nn.Module):
    """Experts of one block: linear layers `{expert}.{gate, up, down}`, with the forward of the fused module.

    Every expert is called for every batch, possibly with no tokens, so that a pass that stops at each layer reaches the
    same layers in each batch.

    Args:
        fused: the module of transformers; it is not changed.
        names: the names of an expert's layers, in the order of `expert_parts`.
    """

    def __init__(self, fused: nn.Module, names: Sequence[str] = NAMES) -> None:
        super().__init__()
        self.parts, self.count = expert_parts(fused, names), expert_count(fused)
        self.names = tuple(part.name for part in self.parts)
        used = {place for part in self.parts for place in (part.weight, part.bias) if place is not None}
        other = [name for name, _ in fused.named_parameters(recurse=False) if name not in used]
        if other:
            raise UnsupportedModelError(f"{type(fused).__name__} has {other[0]}, which is no expert's matrix")
        for expert in range(self.count):
            layers = {part.name: self._linear(fused, part, expert) for part in self.parts}
            self.container().add_module(str(expert), nn.ModuleDict(layers))
        for name, child in fused.named_children():
            if name not in {place.split(".")[0] for place in used}:
                self.add_module(name, child)
        self._functions = (_without_parameters(fused),)  # in a tuple: it is no child

    def container(self) -> nn.Module:
        """Return the module that holds the experts under their numbers."""
        return self

    def _linear(self, fused: nn.Module, part: ExpertPart, expert: int) -> nn.Linear:
        place = part.places(self.count, expert)["weight"]
        rows, columns = place.of(fused.get_parameter(part.weight).to("meta")).shape
        return nn.Linear(columns, rows, bias=part.bias is not None, device="meta")

    def layers(self, expert: int) -> list[nn.Module]:
        """Return the linear layers of an expert."""
        found = self.container().get_submodule(str(expert))
        assert isinstance(found, nn.ModuleDict)
        return [found[name] for name in self.names]

    def places(self) -> Iterator[tuple[str, ExpertMatrix]]:
        """Yield the name of each parameter of the linear layers, and its place in the fused module."""
        prefix = next((f"{name}." for name, module in self.named_children() if module is self.container()), "")
        for expert in range(self.count):
            for part in self.parts:
                for kind, place in part.places(self.count, expert).items():
                    yield f"{prefix}{expert}.{part.name}.{kind}", place

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        """Return an expert's outputs (tokens, hidden), before they are weighted."""
        functions: Any = self._functions[0]
        *first, down = self.layers(expert)
        hidden = [layer(inputs) for layer in first]
        inner = functions.act_fn(hidden[0]) if len(hidden) == 1 else _gated(functions, *hidden)
        result = down(inner)
        return cast(Tensor, functions.post_expert_norm(result) if _flag(functions, "has_post_expert_norm") else result)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return Σ weight · expert(x) over the chosen experts; hidden_states (tokens, hidden), top_k_* (tokens, k)."""
        total = torch.zeros_like(hidden_states)
        for expert in range(self.count):
            token, position = torch.where(top_k_index == expert)
            result = self._expert(expert, hidden_states[token])
            weighted = result * top_k_weights[token, position, None]
            total = total.index_add(0, token, weighted.to(total.dtype))
        return total


class ShapedExperts(LinearExperts):
    """Experts of DBRX, which read and return hidden states (samples, tokens, hidden)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of `LinearExperts` in the shape of `hidden_states`."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(flat, top_k_index, top_k_weights).view(hidden_states.shape)


class BatchedExperts(LinearExperts):
    """Experts of Llama 4, which read all tokens, scaled by the router; tokens scaled to zero give zero."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Return the outputs (experts · tokens, hidden) of the experts, each for its own scaled tokens."""
        inputs = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        outputs = []
        for expert, own in enumerate(inputs):
            chosen = torch.where((own != 0).any(-1))[0]
            outputs.append(torch.zeros_like(own).index_add(0, chosen, self._expert(expert, own[chosen])))
        return torch.cat(outputs)


class SortedExperts(LinearExperts):
    """Experts of JetMoE: one matrix each, for tokens that are sorted by expert."""

    def container(self) -> nn.Module:
        if "experts" not in self._modules:
            self.experts = nn.ModuleDict()
        return self.experts

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:  # type: ignore[override]
        """Return the outputs (tokens, out) of `inputs` (tokens, in); `expert_size` has the tokens of each expert."""
        pieces = inputs.split(expert_size)  # type: ignore[no-untyped-call]
        return torch.cat([self.layers(expert)[0](piece) for expert, piece in enumerate(pieces)])


def expert_count(fused: nn.Module) -> int:
    """Return the number of experts of a fused module."""
    return int(cast(Any, fused).num_experts if hasattr(fused, "num_experts") else len(next(fused.parameters())))


def expert_parts(fused: nn.Module, names: Sequence[str] = NAMES) -> tuple[ExpertPart, ...]:
    """Return the linear layers of each expert of a fused module, in the order of its computation: gate, up, down.

    Args:
        fused: a module for which `has_experts` is true.
        names: the names to give them; without a gate the first is not used.
    """
    kind = type(fused).__name__
    if kind == "JetMoeParallelExperts":
        return (ExpertPart("linear", "weight"),)
    gate, up, down = names
    if kind == "DbrxExperts":
        parts = ExpertPart(gate, "mlp.w1"), ExpertPart(up, "mlp.v1"), ExpertPart(down, "mlp.w2", transposed=True)
        return parts
    transposed = kind == "Llama4TextExperts" or _flag(fused, "is_transposed")
    biases = _flag(fused, "has_bias")
    last = ExpertPart(down, "down_proj", "down_proj_bias" if biases else None, transposed=transposed)
    if not getattr(fused, "has_gate", True):
        return ExpertPart(up, "up_proj", "up_proj_bias" if biases else None, transposed=transposed), last
    inner = fused.get_parameter("gate_up_proj").shape[2 if transposed else 1] // 2
    joined = getattr(fused, "is_concatenated", True)
    rows = ((0, inner, None), (inner, 2 * inner, None)) if joined else ((0, None, 2), (1, None, 2))
    bias = "gate_up_proj_bias" if biases else None
    first = ExpertPart(gate, "gate_up_proj", bias, rows[0], transposed)
    return first, ExpertPart(up, "gate_up_proj", bias, rows[1], transposed), last


def is_fused(module: nn.Module) -> bool:
    """True if `module` holds all experts of a block as `gate_up_proj` (experts, 2·inner, hidden) and `down_proj`."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.ndim == down.ndim == 3):
        return False
    plain = gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
    return plain and not hasattr(module, "gate_up_proj_bias")


def has_experts(module: nn.Module) -> bool:
    """True if `module` holds the matrices of several experts in one parameter, in a layout that is known."""
    known = hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")  # use_experts_implementation's
    return known or type(module).__name__ in OTHER_CLASSES


# Classes that transformers does not mark as experts, with the class that replaces them.
OTHER_CLASSES: dict[str, type[LinearExperts]] = {
    "Llama4TextExperts": BatchedExperts,
    "DbrxExperts": ShapedExperts,
    "JetMoeParallelExperts": SortedExperts,
}


def unfuse(model: nn.Module, names_of: Callable[[str, nn.Module], Sequence[str]]) -> dict[str, ExpertMatrix]:
    """Replace fused experts in `model`, on the meta device, by linear layers.

    Args:
        model: is changed.
        names_of: returns the names of an expert's layers, by the path of the fused module and the module.

    Returns:
        the place of each parameter of the new layers in a parameter that `model` had, by full names.
    """
    places: dict[str, ExpertMatrix] = {}
    for path, module in list(model.named_modules()):
        if not has_experts(module):
            continue
        replacement = OTHER_CLASSES.get(type(module).__name__, LinearExperts)(module, names_of(path, module))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
        for name, place in replacement.places():
            parameter = f"{path}.{place.parameter}"
            places[f"{path}.{name}"] = ExpertMatrix(parameter, place.count, place.expert, place.rows, place.transposed)
    return places


def _gated(functions: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Return what the fused module makes of the outputs of gate and up."""
    if type(functions).__name__ == "DbrxExperts":
        return cast(Tensor, functions.mlp.activation_fn(gate) * up)
    own = getattr(type(functions), "_apply_gate", moe._default_apply_gate)
    if own is moe._default_apply_gate:
        return cast(Tensor, functions.act_fn(gate) * up)
    joined = getattr(functions, "is_concatenated", True)
    both = torch.cat((gate, up), -1) if joined else torch.stack((gate, up), -1).flatten(-2)
    return cast(Tensor, functions._apply_gate(both))


def _flag(module: Any, name: str) -> bool:
    return bool(getattr(module, name, False))


def _without_parameters(fused: nn.Module) -> nn.Module:
    """Return a copy of a module that has its functions and settings, but none of its parameters."""
    result = copy(fused)
    result._parameters = {}
    if "mlp" in fused._modules:
        result._modules = {**fused._modules, "mlp": _without_parameters(fused.get_submodule("mlp"))}
    return result
