"""Tiny models of every model type that transformers can build, made by shrinking the type's default configuration."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

VOCABULARY, HEADS, HEAD_DIM, WIDTH, INNER = 256, 4, 16, 64, 128
SPECIAL_IDS = range(200, 250)  # of images, sounds and the like: no sample has them
MOST_LAYERS, MOST_PARAMETERS = 5, 16_000_000
GAIN = 1.5  # of linear weights: a layer's outputs are this many times as large as its inputs

# A setting's new value, by the first regular expression that its name matches. Values that are smaller stay.
SIZES: list[tuple[str, int]] = [
    (r"vocab_size|vocab_size_per_layer_input|num_embeddings|codebook_size", VOCABULARY),
    (r"global_head_dim|qk_head_dim|index_head_dim", 2 * HEAD_DIM),
    (r"head_dim|d_kv|headdim|d_head|dim_head|head_size|rotary_dim|d_rel|query_pre_attn_scalar", HEAD_DIM),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 2 * HEADS),
    (r"(key_value|kv|key|query)_heads|num_kv_heads|n_head_kv|num_query_groups", 2),
    (r"heads$|_head$|n_heads$|attention_heads|num_heads", HEADS),
    (r"experts_per_tok(en)?$|top_?k_experts|moe_topk|moe_top_k|num_selected_experts|experts_top_k|moe_k$", 2),
    (r"^(num|n|moe_num)_(local_|routed_)?experts$|zero_expert_num|num_experts$|n_routed_experts", 4),
    (r"^n_groups?$|^num_group$|^topk_group$|^num_expert_groups?$|o_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"first_k_dense_replace|num_dense_layers|num_hash_layers|moe_layer_start_index|moe_layer_offset", 1),
    (r"num_kv_shared_layers|moe_layer_end_index", 2),
    (r"lora_rank|lora_dim|_rank$|dt_rank", 32),
    (r"deepstack|num_nextn_predict|layer_interval|layer_period|layer_frequency|num_conv_layers", 2),
    (r"layers$|n_layer$|depth$|num_blocks$|layers_per_|num_decoder_layers|num_encoder_layers|encoder_layer", 2),
    (r"d_state|state_size", HEAD_DIM),
    (r"chunk_size|chunk_length|sliding_window|attention_window|local_attention|block_size|index_topk|window_size", 16),
    (
        r"intermediate|mamba_d_ssm|ffn_dim|d_ff|ffn_hidden|n_inner|mlp_dim|inner_dim|feed_forward|ffn_size",
        INNER,
    ),
    (
        r"hidden_size|d_model|n_embd|emb(ed)?_dim|embedding_size|embedding_dim|hidden_dim|lru_width|^dim$|embed_proj",
        WIDTH,
    ),
    (r"projection_dim|output_dim|output_hidden|attention_dim|pooler_output_size|project_dim|conv_dim$", WIDTH),
    (r"context_length|max_seq|n_positions|max_position|max_source|max_target|max_length|seq_len|n_ctx", 128),
    (r"num_query|num_latents|query_tokens|resampler_n_latents|num_image_tokens|num_queries", 8),
    (r"conv_channels|num_filters|base_channels|codebook_dim|codevector_dim|channels_size", 32),
]
ID = re.compile(r"(_id|_ids|_index|(?<!per)_token|^token|_token_ids)$")
# Overrides of what shrinking gives, by type: names with dots are of nested configurations; None takes a name away.
MROPE = [4, 2, 2]  # of half a head's dimensions, for time, height and width
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": MROPE}
_HALF_MROPE = {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"text_config.rope_parameters": _MROPE} for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "glm_image")},
    **{name: {"text_config.rope_parameters": _MROPE} for name in ("paddleocr_vl", "qwen2_5_omni_thinker")},
    **{name: {"text_config.rope_parameters": _MROPE} for name in ("qwen2_vl", "qwen2_5_vl")},
    **{name: {"decoder_start_token_id": 0} for name in ("t5", "longt5", "mt5", "umt5", "switch_transformers")},
    **{f"{name}_text": {"rope_parameters": _MROPE} for name in ("glm4v", "glm_ocr", "glm_image")},
    **{f"{name}_text": {"rope_parameters": _MROPE} for name in ("qwen2_vl", "qwen2_5_vl")},
    "bamba": {"attn_layer_indices": [1], "layers_block_type": None, "layer_types": None},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 201, "IMGIMGAZ": 202}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.kv_n_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "emu3": {"vocabulary_map": {"<image>": 201}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 201},
    "falcon_h1": {"mamba_d_head": 16},
    "glm4v_moe": {"text_config.rope_parameters": _HALF_MROPE},
    "glm4v_moe_text": {"rope_parameters": _HALF_MROPE},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "layers_block_type": None,
        "layer_types": None,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}


def groups() -> dict[str, dict[str, str]]:
    """The classes of all types of each group; a type that fits several groups is in the last of them that it fits."""
    pictures = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    pairs = {
        **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    pairs = {name: cls for name, cls in pairs.items() if name not in pictures}
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal = {name: cls for name, cls in causal.items() if name not in pictures and pairs.get(name) != cls}
    others = {**causal, **pictures, **pairs}
    bases = {name: cls for name, cls in modeling_auto.MODEL_MAPPING_NAMES.items() if name not in others}
    return {"causal": causal, "image-text": pictures, "seq2seq": pairs, "base": bases}


def model_class(name: str | tuple[str, ...]) -> type[PreTrainedModel]:
    """A class of transformers; of several for one type, the first."""
    found: type[PreTrainedModel] = getattr(transformers, name if isinstance(name, str) else name[0])
    return found


def shrink(model_type: str, keep_layer_lists: bool = True) -> PreTrainedConfig:
    """The default configuration of a type with small sizes; without lists of layers the type fills them again."""
    default = CONFIG_MAPPING[model_type]()
    settings = _shrink_settings(_settings(default), iter(SPECIAL_IDS), keep_layer_lists)
    for name, value in EXCEPTIONS.get(model_type, {}).items():
        *path, last = name.split(".")
        place = settings
        for part in path:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return type(default)(**settings)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """All settings of a configuration and of those nested in it, by the names that its class takes."""
    settings = config.to_dict()
    nested = {name for name in getattr(config, "sub_configs", {}) or {} if isinstance(settings.get(name), dict)}
    for name in nested:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            settings[name] = _settings(part)
    for name in ("transformers_version", "architectures", "dtype", "torch_dtype", "per_layer_config"):
        settings.pop(name, None)
    return settings


def _shrink_settings(settings: dict[str, Any], free_ids: Iterator[int], keep_layer_lists: bool) -> dict[str, Any]:
    """Shrink one configuration; lists with an entry a layer keep layers of each kind."""
    layers = next((settings[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if settings.get(k)), None)
    kept = _kept_layers(settings, layers) if isinstance(layers, int) else []
    small: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key)
        if isinstance(value, list | tuple) and len(value) == layers and layers > 3:
            if keep_layer_lists:
                small[name] = [value[index] for index in kept]
        elif isinstance(value, dict) and name != "id2label":
            small[name] = _shrink_settings(value, free_ids, keep_layer_lists)
        elif ID.search(name):
            small[name] = _small_ids(name, value, free_ids)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _small_size(name, value)
        elif isinstance(value, list | tuple) and re.search("ind(ex|ices)|layer_ids|layers$", name):
            small[name] = type(value)(sorted({min(v, 1) for v in value})) if _integers(value) else value
        elif name == "mrope_section":
            small[name] = MROPE
        elif name == "head_dim" and value is None:
            small[name] = HEAD_DIM
        else:
            small[name] = value
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(small.get(name), int) and kept:
            small[name] = len(kept)
    _match_heads(settings, small)
    small.pop("id2label", None), small.pop("label2id", None)
    return small


def _match_heads(settings: Mapping[str, Any], small: dict[str, Any]) -> None:
    """As many key heads as query heads where the default has as many."""
    for heads, keys in (
        ("num_attention_heads", "num_key_value_heads"),
        ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ):
        if settings.get(keys) and settings.get(keys) == settings.get(heads):
            small[keys] = small[heads]


def _kept_layers(settings: Mapping[str, Any], layers: int) -> list[int]:
    """Layers such that each kind of every list of layers is among them: at most five, in order."""
    lists = [value for value in settings.values() if isinstance(value, list | tuple) and len(value) == layers]
    kinds = [tuple(str(value[index]) for value in lists) for index in range(layers)]
    first = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]][:MOST_LAYERS]
    while len(first) < min(2, layers):
        first.append(max(first) + 1)
    return sorted(first)


def _small_size(name: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return min(value, size)
    return value


def _small_ids(name: str, value: Any, free_ids: Iterator[int]) -> Any:
    """Ids within the vocabulary: the first three stay what they are, others are ones that no sample has."""
    if _integers(value):
        return [_small_ids(name, part, free_ids) for part in value]
    if isinstance(value, bool) or not isinstance(value, int) or value < 3:
        return value
    return next(free_ids)


def _integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(part) is int for part in value)


def build(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model in float32 with random weights; raise ValueError if it is not small."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters after shrinking")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for _, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if is_linear(module, parameter):
                    inputs = min(parameter.shape[-2:]) if parameter.ndim == 3 else parameter[0].numel()
                    parameter.normal_(0, GAIN * inputs**-0.5)
                elif not parameter.isfinite().all():
                    parameter.fill_(0.1)
                elif name == "bias" or parameter.std() == 0:  # norms: so that one that is lost shows
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def is_linear(module: nn.Module, parameter: nn.Parameter) -> bool:
    """True for the matrix of a linear layer, and for the matrices of experts in one tensor."""
    if isinstance(module, nn.Linear | Conv1D):
        return parameter.ndim == 2
    return parameter.ndim == 3 and "xpert" in type(module).__name__


def random_ids(samples: int = 8, length: int = 48, seed: int = 1) -> list[list[int]]:
    """Token ids that are no special ids of any tiny model."""
    made = torch.randint(8, min(SPECIAL_IDS), (samples, length), generator=torch.Generator().manual_seed(seed))
    return made.tolist()


def inputs(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Arguments that a model may take, likely ones first."""
    ids = torch.tensor(random_ids(2))
    yield {"input_ids": ids}
    yield {"input_ids": ids, "decoder_input_ids": ids}
    bins = next((size for name in ("num_mel_bins", "feature_size") if (size := _anywhere(model.config, name))), 80)
    frames = 2 * (_anywhere(model.config, "max_source_positions") or 64)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, bins, frames, generator=generator)
    for name, value in (
        ("input_features", features),
        ("input_features", features.mT),
        ("input_values", torch.randn(2, 8000, generator=generator)),
    ):
        yield {name: value, "decoder_input_ids": ids}
        yield {name: value, "input_ids": ids}


def _anywhere(config: PreTrainedConfig, name: str) -> int | None:
    """A setting of a configuration, or of one nested in it."""
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", {}) or {})]
    return next((value for part in parts if isinstance(value := getattr(part, name, None), int)), None)


def output(model: PreTrainedModel, arguments: dict[str, Tensor]) -> Tensor:
    """The logits of a model, or the hidden states of one without a head."""
    torch.manual_seed(3)
    with torch.no_grad():
        result = model(**arguments)
    for name in ("logits", "prediction_logits", "last_hidden_state", "logits_per_text"):
        if isinstance(result.get(name) if isinstance(result, Mapping) else None, Tensor):
            return result[name].float()
    raise ValueError(f"{type(result).__name__} has neither logits nor hidden states")
