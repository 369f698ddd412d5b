"""Model families of llama.cpp: the metadata of each, and the order in which it expects rows."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesse.errors import UnsupportedModelError
from hesse.networks.families import FAMILIES, GgufFamily, family_of
from hesse.runtimes.exported_layers import head_width

if TYPE_CHECKING:
    from gguf import GGUFWriter

RowOrder = Callable[[str, Any], Tensor | None]


def find_family(config: Any) -> GgufFamily:
    """Return the GGUF family of a transformers config.

    Raises:
        UnsupportedModelError: Hesse does not write GGUF of the family, or llama.cpp would compute something else.
    """
    family = family_of(config.model_type).gguf
    if family is None:
        known = [name for name, one in FAMILIES.items() if one.gguf is not None]
        raise UnsupportedModelError(
            f"GGUF of the family {config.model_type!r} is not written; the families are {', '.join(known)}"
        )
    for name, supported in family.settings.items():
        value = getattr(config, name, supported[0])
        if value not in supported:
            raise UnsupportedModelError(
                f"config.json has {name} {value!r}, but llama.cpp computes {config.model_type} with {supported[0]!r}"
            )
    kind = rotary(config).get("rope_type", "default")
    if kind not in ("default", "linear") and (kind, family.architecture) != ("llama3", "llama"):
        raise UnsupportedModelError(f"rotary positions of the type {kind!r} are not written for {config.model_type}")
    return family


def describe(writer: "GGUFWriter", family: GgufFamily, config: Any) -> None:
    """Write all metadata of the model except its tokenizer."""
    for name, value in METADATA[family.metadata](config).items():
        getattr(writer, f"add_{name}")(value)
    if rotary(config).get("rope_type") == "linear":
        from gguf import RopeScalingType  # imported late: optional

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary(config)["factor"]))


def row_order(family: GgufFamily, name: str, config: Any) -> Tensor | None:
    """Return the order of a tensor's rows (out,) in llama.cpp, by the name without ".weight"; None: unchanged."""
    return ROW_ORDERS[family.row_order](name, config)


def _rotary_metadata(config: Any) -> dict[str, Any]:
    """Return the metadata of Llama-like models: RMS norm, gated feed-forward, rotary positions, grouped queries."""
    head = head_width(config)
    return {
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head,
        "value_length": head,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": head,
        "rope_freq_base": float(rotary(config)["rope_theta"]),
    }


def _neox_metadata(config: Any) -> dict[str, Any]:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "layer_norm_eps": config.layer_norm_eps,
        "parallel_residual": config.use_parallel_residual,
        "rope_dimension_count": int(head_width(config) * rotary(config).get("partial_rotary_factor", 1.0)),
        "rope_freq_base": float(rotary(config)["rope_theta"]),
    }


def _gpt2_metadata(config: Any) -> dict[str, Any]:
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "head_count": config.n_head,
        "layer_norm_eps": config.layer_norm_epsilon,
    }


def _neighbouring_pairs(name: str, config: Any) -> Tensor | None:
    """llama.cpp rotates neighbouring rows of queries and keys as pairs; transformers pairs rows half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return None
    head = head_width(config)
    return torch.arange(heads * head).view(heads, 2, head // 2).transpose(1, 2).reshape(-1)


def _queries_first(name: str, config: Any) -> Tensor | None:
    """GPT-NeoX stores query, key and value per head; llama.cpp expects all queries, then all keys, then all values."""
    if not name.endswith("query_key_value"):
        return None
    head = head_width(config)
    return torch.arange(3 * config.hidden_size).view(-1, 3, head).transpose(0, 1).reshape(-1)


def context_length(config: Any) -> int:
    """Return the positions for which llama.cpp agrees with transformers: llama.cpp ignores sliding windows."""
    window = getattr(config, "sliding_window", None)
    used = window if getattr(config, "use_sliding_window", True) else None
    return int(min(config.max_position_embeddings, used or config.max_position_embeddings))


def rotary_factors(config: Any) -> Tensor | None:
    """Return the divisor of each rotary frequency (head // 2,) for Llama 3.1's stretched long waves; else None."""
    rope = rotary(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = head_width(config) // 2
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(width, dtype=torch.float64) / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / waves
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged
    divisors: Tensor = 1 / ((1 - share) / factor + share)
    return divisors.float()


def rotary(config: Any) -> dict[str, Any]:
    """Return the config's rotary parameters; empty if positions are not rotary."""
    return getattr(config, "rope_parameters", None) or {}


# What the family calls `GGUFWriter.add_...` with, by the end of the name.
METADATA: dict[str, Callable[[Any], dict[str, Any]]] = {
    "rotary": _rotary_metadata,
    "neox": _neox_metadata,
    "gpt2": _gpt2_metadata,
}
ROW_ORDERS: dict[str, RowOrder] = {
    "unchanged": lambda name, config: None,
    "rotary-pairs": _neighbouring_pairs,
    "queries-first": _queries_first,
}
