"""torch's MultiheadAttention in plain operations: its layers are called, and its heads need not fill its width."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesse.errors import UnsupportedModelError


class NarrowAttention(nn.MultiheadAttention):
    """Attention whose heads need not fill the width: `num_heads` · `head_dim` may be less than `embed_dim`.

    Its weights are `in_proj_weight` (3 · inner, embed_dim) and `out_proj.weight` (embed_dim, inner), inner being
    `num_heads` · `head_dim`.
    """

    @classmethod
    def narrowed(cls, attention: nn.MultiheadAttention, heads: int) -> None:
        """Make `attention`, whose weights were cut, one of these.

        Raises:
            UnsupportedModelError: it has weights of a kind that this class does not know.
        """
        if not _is_plain(attention):
            raise UnsupportedModelError(
                "a MultiheadAttention with kdim, vdim, bias_kv or add_zero_attn keeps its heads"
            )
        attention.__class__ = cls
        attention.num_heads = heads
        attention._qkv_same_embed_dim = False  # no fused path, which knows the full width only

    def widened(self) -> None:
        """Be a MultiheadAttention of torch again, with all of its heads."""
        self.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
        self._qkv_same_embed_dim = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: (batch, positions, embed_dim), or (positions, batch, embed_dim); masks (q, k)."""
        first = query.ndim == 3 and not self.batch_first
        parts = [x.transpose(0, 1) if first else x for x in (query, key, value)]
        queries, keys, values = (self._heads(projected) for projected in self._projected(parts))
        scores = queries @ keys.mT / self.head_dim**0.5
        if attn_mask is not None:  # one for all heads, or (batch · heads, q, k)
            scores = _masked(scores, attn_mask if attn_mask.ndim == 2 else attn_mask.view(scores.shape))
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask[..., None, None, :])
        chosen = scores.softmax(-1)
        mixed = functional.dropout(chosen, self.dropout, self.training) @ values
        result = self.out_proj(mixed.transpose(-2, -3).flatten(-2))
        shown = (chosen.mean(-3) if average_attn_weights else chosen) if need_weights else None
        return (result.transpose(0, 1) if first else result), shown

    def _projected(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Queries, keys and values (..., positions, inner) of what each is made of."""
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights = self.in_proj_weight.chunk(3)
        return [functional.linear(x, w, b) for x, w, b in zip(parts, weights, biases, strict=True)]

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.num_heads, self.head_dim).transpose(-2, -3)


def plain_attentions(model: nn.Module) -> list[nn.MultiheadAttention]:
    """Those of torch's own below `model` that can be taken apart."""
    found = (module for module in model.modules() if type(module) is nn.MultiheadAttention)
    return [attention for attention in found if _is_plain(attention)]


@contextmanager
def outputs_called(model: nn.Module) -> Iterator[None]:
    """The attentions of torch's own below `model` with `out_proj` called as a layer, so that hooks see it."""
    attentions = plain_attentions(model)
    for attention in attentions:
        NarrowAttention.narrowed(attention, attention.num_heads)
    try:
        yield
    finally:
        for attention in attentions:
            assert isinstance(attention, NarrowAttention)
            attention.widened()


def without_nested_tensors(model: nn.Module) -> None:
    """Have torch's encoders pad where attentions below are not torch's own, and know nothing else."""
    for encoder in model.modules():
        inside = any(isinstance(module, NarrowAttention) for module in encoder.modules())
        if inside and isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    return bool(attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
