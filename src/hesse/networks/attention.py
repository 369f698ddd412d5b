"""Record how much attention each position of a sample receives in a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

NAME = "hesse_attention_received"


def tells_attention(model: nn.Module) -> bool:
    """True if the model's blocks use transformers' attention interface, through which attention can be recorded."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    return bool(getattr(model, "_supports_attention_backend", False)) and config._attn_implementation == "sdpa"


@contextmanager
def attention_received(block: nn.Module) -> Iterator[list[Tensor]]:
    """Record the attention that positions receive while inside: each attention below `block` appends to the list.

    An entry is (samples, tokens): the attention probabilities summed over heads and queries.
    """
    received: list[Tensor] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        causal = settings.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        received.append(attention_per_key(query, key, attention_mask, settings.get("scaling"), bool(causal)))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)

    configs = {id(config): config for module in block.modules() if (config := getattr(module, "config", None))}
    chosen = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == "sdpa"]
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    try:
        for config in chosen:
            config._attn_implementation = NAME
        yield received
    finally:
        for config in chosen:
            config._attn_implementation = "sdpa"
        AttentionInterface._global_mapping.pop(NAME, None)


def attention_per_key(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, causal: bool) -> Tensor:
    """Return the attention that each key receives (samples, keys), summed over heads and queries, in float32.

    `query` is (samples, heads, queries, width), `key` (samples, heads or fewer, keys, width). A boolean `mask` (samples
    or 1, heads or 1, queries, keys) is true where a query may attend; a floating-point mask is added to the scores. One
    head of one sample is in memory at a time.
    """
    samples, heads, queries, width = query.shape
    keys, share = key.shape[2], heads // key.shape[1]
    ahead = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(1 + keys - queries)
    total = torch.zeros(samples, keys, device=query.device)
    for sample in range(samples):
        for head in range(heads):
            scores = query[sample, head].float() @ key[sample, head // share].float().T
            scores *= width**-0.5 if scaling is None else scaling
            if mask is not None:
                part = mask[sample % len(mask), head % mask.shape[1]]
                scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
            elif causal and queries > 1:
                scores = scores.masked_fill(ahead, -torch.inf)
            total[sample] += scores.softmax(-1).nan_to_num().sum(0)
    return total
