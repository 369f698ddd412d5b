"""Tables of everything that depends on single architectures: a new model family is an entry here.

Most families need no entry: blocks, layers and names on disk follow from the model and from transformers' conversion
table. The tables hold the rest: the tensors that pass features on unchanged, the names of families in other programs,
the names of experts, and the settings of config.json that give sizes.
"""

import re
from dataclasses import dataclass, field
from typing import Any

# --- names of layers -------------------------------------------------------------------------------------------------

# Modules that route tokens to experts, and what they consist of: a few thousand weights that no loader supports in
# quantised form.
ROUTERS = ("gate", "router", "shared_expert_gate")

# Names of an expert's gate, up and down projections in the checkpoint.
EXPERT_LAYERS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
EXPERT_PATTERN = "*.experts.*"  # as a recipe names them
EXPERT_REGEX = r".*\.experts\.\d+\..*"  # as compressed-tensors names them
_EXPERT_NUMBER = re.compile(r".*\.experts\.(\d+)\.")

# Layers that vLLM reads as one matrix, so that they need one scheme.
READ_AS_ONE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))

# Feed-forward layers inside a block, apart from experts: the layers that write hidden units, and their reader.
FEED_FORWARD_LAYERS = (
    (("mlp.gate_up_proj",), "mlp.down_proj"),
    (("mlp.fc1",), "mlp.fc2"),
    (("fc1",), "fc2"),
    (("mlp.c_fc",), "mlp.c_proj"),
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("ffn.lin1",), "ffn.lin2"),
)


def is_expert(layer: str) -> bool:
    """True if the layer of that name is one matrix of one expert."""
    return expert_number(layer) is not None


def expert_number(layer: str) -> str | None:
    """Return the number of the expert that a layer belongs to; None if it belongs to none."""
    match = _EXPERT_NUMBER.match(layer)
    return None if match is None else match[1]


# --- settings of config.json, and attributes of modules --------------------------------------------------------------

# Names of the numbers of heads in attention modules and configurations, and of attributes that are multiples of them.
HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "nhead",
    "heads",
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
)
HEAD_MULTIPLES = ("all_head_size", "split_size", "inner_dim")

# Names of the widths of feed-forward layers: in modules, and in config.json.
MODULE_WIDTHS = ("intermediate_size", "intermediate_dim")
CONFIG_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "hidden_dim",
)
# Widths in config.json that slicing a module in memory may change, in the order in which they are set.
SLICED_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "word_embed_proj_dim",
    "pooler_output_size",
)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")

# Settings that list blocks by number, and rules by which a block's number decides its kind, with their harmless value.
BLOCK_LISTS = ("mlp_only_layers",)
BLOCK_RULES = {
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "interleave_moe_layer_step": 1,
}


# --- families, by config.json's model_type ---------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureStreams:
    """Differences from Llama in how a family passes features between layers unchanged."""

    feedforward_norm: str = "post_attention_layernorm"
    norm_offset: float = 0.0  # what the model adds to a norm's stored scale
    rotates: bool = True  # False: norms with scales of their own lie between a block's outputs and the residual stream


@dataclass(frozen=True)
class GgufFamily:
    """A family in llama.cpp; `metadata` and `row_order` name functions of hesse.runtimes.gguf_families."""

    architecture: str  # llama.cpp's name
    metadata: str = "rotary"
    row_order: str = "unchanged"
    settings: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # values that llama.cpp assumes


@dataclass(frozen=True)
class ModelFamily:
    """Properties of the models of one `model_type`; None or False: not supported."""

    streams: FeatureStreams | None = None  # for rotations and scalings
    gguf: GgufFamily | None = None
    onnx: bool = False
    transposed: bool = False  # linear layers are (in, out) on disk
    positions_after_padding: bool = False  # position ids start after the padding token's id


_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
_ROBERTA = ModelFamily(positions_after_padding=True)

FAMILIES: dict[str, ModelFamily] = {
    "llama": ModelFamily(FeatureStreams(), GgufFamily("llama", row_order="rotary-pairs", settings=_SILU), onnx=True),
    "mistral": ModelFamily(FeatureStreams(), GgufFamily("llama", row_order="rotary-pairs", settings=_SILU), onnx=True),
    "qwen2": ModelFamily(FeatureStreams(), GgufFamily("qwen2", settings=_SILU), onnx=True),
    "qwen3": ModelFamily(FeatureStreams(), GgufFamily("qwen3", settings=_SILU), onnx=True),
    "gemma": ModelFamily(FeatureStreams(norm_offset=1.0)),
    "gemma2": ModelFamily(FeatureStreams("pre_feedforward_layernorm", 1.0, rotates=False)),
    "gemma3_text": ModelFamily(FeatureStreams("pre_feedforward_layernorm", 1.0, rotates=False)),
    "gpt_neox": ModelFamily(
        gguf=GgufFamily(
            "gptneox",
            "neox",
            "queries-first",
            {"hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")},
        )
    ),
    "gpt2": ModelFamily(
        gguf=GgufFamily(
            "gpt2",
            "gpt2",
            settings={
                "activation_function": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu"),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
            },
        ),
        transposed=True,
    ),
    "openai-gpt": ModelFamily(transposed=True),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _ROBERTA,
}
UNKNOWN = ModelFamily()


def family_of(model_type: str) -> ModelFamily:
    """Return the family of a `model_type`; most have no entry, and get the defaults."""
    return FAMILIES.get(model_type, UNKNOWN)
