"""torch's MultiheadAttention in plain operations, with layers that are called and heads that may be fewer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from hesse.errors import UnsupportedModelError


class NarrowAttention(nn.MultiheadAttention):
    """MultiheadAttention whose `num_heads` · `head_dim` may be less than `embed_dim`.

    Its weights are `in_proj_weight` (3 · inner, embed_dim) and `out_proj.weight` (embed_dim, inner), with inner =
    `num_heads` · `head_dim`.
    """

    @classmethod
    def convert(cls, attention: nn.MultiheadAttention, heads: int) -> None:
        """Convert `attention`, whose weights have been sliced to `heads` heads, to this class in place.

        Raises:
            UnsupportedModelError: it has weights that this class does not support.
        """
        if not _is_plain(attention):
            raise UnsupportedModelError(
                "a MultiheadAttention with kdim, vdim, bias_kv or add_zero_attn keeps its heads"
            )
        attention.__class__ = cls
        attention.num_heads = heads
        attention._qkv_same_embed_dim = False  # disables the fused path, which assumes the full width

    def restore(self) -> None:
        """Convert to torch's MultiheadAttention again, in place; all heads must be present."""
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
        """Compute torch's attention on (batch, positions, embed_dim) or (positions, batch, embed_dim); masks (q, k)."""
        first = query.ndim == 3 and not self.batch_first
        parts = [x.transpose(0, 1) if first else x for x in (query, key, value)]
        queries, keys, values = (self._heads(projected) for projected in self._project(parts))
        scores = queries @ keys.mT / self.head_dim**0.5
        if attn_mask is not None:  # one for all heads, or (batch · heads, q, k)
            scores = _mask(scores, attn_mask if attn_mask.ndim == 2 else attn_mask.view(scores.shape))
        if key_padding_mask is not None:
            scores = _mask(scores, key_padding_mask[..., None, None, :])
        probabilities = scores.softmax(-1)
        mixed = functional.dropout(probabilities, self.dropout, self.training) @ values
        result = self.out_proj(mixed.transpose(-2, -3).flatten(-2))
        weights = (probabilities.mean(-3) if average_attn_weights else probabilities) if need_weights else None
        return (result.transpose(0, 1) if first else result), weights

    def _project(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return queries, keys and values (..., positions, inner), each from its input."""
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        matrices = self.in_proj_weight.chunk(3)
        return [functional.linear(x, w, b) for x, w, b in zip(parts, matrices, biases, strict=True)]

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.num_heads, self.head_dim).transpose(-2, -3)


def plain_attentions(model: nn.Module) -> list[nn.MultiheadAttention]:
    """Return torch's own attentions below `model` that can be converted to NarrowAttention."""
    attentions = (module for module in model.modules() if type(module) is nn.MultiheadAttention)
    return [attention for attention in attentions if _is_plain(attention)]


@contextmanager
def outputs_called(model: nn.Module) -> Iterator[None]:
    """Make torch's own attentions below `model` call `out_proj` as a layer while inside, so that its hooks run."""
    attentions = plain_attentions(model)
    for attention in attentions:
        NarrowAttention.convert(attention, attention.num_heads)
    try:
        yield
    finally:
        for attention in attentions:
            assert isinstance(attention, NarrowAttention)
            attention.restore()


def without_nested_tensors(model: nn.Module) -> None:
    """Disable nested tensors in torch's encoders that contain NarrowAttention, which supports only padded tensors."""
    for encoder in model.modules():
        inside = any(isinstance(module, NarrowAttention) for module in encoder.modules())
        if inside and isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    return bool(attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn)


def _mask(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
