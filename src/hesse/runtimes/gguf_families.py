"""What llama.cpp calls each family, what it must be told about one, and in which order it takes rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesse.errors import UnsupportedModelError
from hesse.runtimes.exported_layers import head_width

if TYPE_CHECKING:
    from gguf import GGUFWriter

Describe = Callable[["GGUFWriter", Any], None]
RowOrder = Callable[[str, Any], Tensor | None]


@dataclass(frozen=True)
class Family:
    """A family of models that llama.cpp runs."""

    architecture: str  # llama.cpp's name
    describe: Describe  # writes the metadata that its loader asks for
    row_order: RowOrder  # the order of a tensor's rows (out,), by its name without ".weight"; None: as they are
    settings: dict[str, tuple[Any, ...]]  # what llama.cpp takes for granted, by its name in the config
    transposed: bool = False  # linear layers are (in, out) on disk


def find_family(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        UnsupportedModelError: GGUF of it is not written, or llama.cpp would compute something else.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"GGUF of the family {config.model_type!r} is not written; the families are {', '.join(FAMILIES)}"
        )
    for name, taken in family.settings.items():
        value = getattr(config, name, taken[0])
        if value not in taken:
            raise UnsupportedModelError(
                f"config.json has {name} {value!r}, where llama.cpp computes {config.model_type} with {taken[0]!r}"
            )
    kind = rotary(config).get("rope_type", "default")
    if kind not in ("default", "linear") and (kind, family.architecture) != ("llama3", "llama"):
        raise UnsupportedModelError(f"rotary positions of the type {kind!r} are not written for {config.model_type}")
    return family


def describe(writer: "GGUFWriter", family: Family, config: Any) -> None:
    """Write all metadata of the model but its tokenizer."""
    family.describe(writer, config)
    if rotary(config).get("rope_type") == "linear":
        from gguf import RopeScalingType  # imported late: optional

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary(config)["factor"]))


def _describe_rotary(writer: "GGUFWriter", config: Any) -> None:
    """Llama and its kin: normalised by root mean square, gated, rotary positions, heads that share keys."""
    head = head_width(config)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rotary(config)["rope_theta"]))


def _describe_neox(writer: "GGUFWriter", config: Any) -> None:
    head = head_width(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_rope_dimension_count(int(head * rotary(config).get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rotary(config)["rope_theta"]))


def _describe_gpt2(writer: "GGUFWriter", config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _as_they_are(name: str, config: Any) -> Tensor | None:
    return None


def _pairs_side_by_side(name: str, config: Any) -> Tensor | None:
    """llama.cpp turns neighbouring rows of queries and keys together, transformers those half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.rpartition(".")[2])
    if heads is None:
        return None
    head = head_width(config)
    return torch.arange(heads * head).view(heads, 2, head // 2).transpose(1, 2).reshape(-1)


def _queries_first(name: str, config: Any) -> Tensor | None:
    """GPT-NeoX has query, key and value of a head together; llama.cpp takes all queries, then keys, then values."""
    if not name.endswith("query_key_value"):
        return None
    head = head_width(config)
    return torch.arange(3 * config.hidden_size).view(-1, 3, head).transpose(0, 1).reshape(-1)


def context_length(config: Any) -> int:
    """Positions for which llama.cpp computes what transformers computes: it attends to all, not to a sliding window."""
    window = getattr(config, "sliding_window", None)
    used = window if getattr(config, "use_sliding_window", True) else None
    return int(min(config.max_position_embeddings, used or config.max_position_embeddings))


def rotary_factors(config: Any) -> Tensor | None:
    """What each rotary frequency is divided by (head // 2,) where Llama 3.1 stretches long waves; else None."""
    rope = rotary(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = head_width(config) // 2
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(width, dtype=torch.float64) / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / waves
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it was
    divided: Tensor = 1 / ((1 - share) / factor + share)
    return divided.float()


def rotary(config: Any) -> dict[str, Any]:
    """The config's rotary parameters; empty where positions are not rotary."""
    return getattr(config, "rope_parameters", None) or {}


SILU = {"hidden_act": ("silu", "swish")}
FAMILIES = {
    "llama": Family("llama", _describe_rotary, _pairs_side_by_side, SILU),
    "mistral": Family("llama", _describe_rotary, _pairs_side_by_side, SILU),
    "qwen2": Family("qwen2", _describe_rotary, _as_they_are, SILU),
    "qwen3": Family("qwen3", _describe_rotary, _as_they_are, SILU),
    "gpt_neox": Family(
        "gptneox",
        _describe_neox,
        _queries_first,
        {"hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")},
    ),
    "gpt2": Family(
        "gpt2",
        _describe_gpt2,
        _as_they_are,
        {
            "activation_function": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        transposed=True,
    ),
}
