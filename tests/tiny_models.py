"""Tiny randomly initialised models of every family, as folders on disk."""

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

WIDTH, INNER, VOCABULARY, POSITIONS = 64, 96, 512, 128
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name: (architecture, configuration class, settings)
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 16, "sliding_window": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{k: v for k, v in COMMON.items() if k not in ("intermediate_size", "pad_token_id")},
            "ffn_dim": INNER,
            "word_embed_proj_dim": 32,
            "pad_token_id": 1,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "falcon-new": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-alibi": ("FalconForCausalLM", "FalconConfig", {**FALCON, "alibi": True}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**GROUPED, **EXPERTS, "head_dim": 16}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**GROUPED, "num_experts": 6, "num_experts_per_tok": 2}),
    "bert": ("BertModel", "BertConfig", COMMON),
    "bert-masked": ("BertForMaskedLM", "BertConfig", COMMON),
    "roberta": ("RobertaModel", "RobertaConfig", COMMON),
    "minilm": ("BertModel", "BertConfig", {**COMMON, "num_attention_heads": 8, "hidden_act": "gelu"}),
}
ENCODERS = ("bert", "bert-masked", "roberta", "minilm")


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save a random model of the family `name` into `folder`, with weights large enough to tell mistakes apart."""
    architecture, configuration, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**{**settings, **changes})
    model = getattr(transformers, architecture)(config).eval()
    for parameter in model.parameters():
        noise = 0.1 * torch.randn_like(parameter)
        parameter.data = noise if parameter.ndim > 1 else parameter.data + noise
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    return folder


def load(name: str, folder: Path, **options: object) -> PreTrainedModel:
    """The model as plain transformers loads it."""
    model: PreTrainedModel = getattr(transformers, FAMILIES[name][0]).from_pretrained(folder, **options)
    return model.eval()


def random_ids(samples: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Token ids that every family above knows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (samples, tokens), generator=generator).tolist()
