"""Encoder-decoders: the step between their two lists of blocks, and the token ids that their decoder reads."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel


class DecoderEntry(nn.Module):
    """Step from the output of an encoder's last block to the input of a decoder's first, among a network's blocks."""

    def forward(self, hidden: Tensor, enter: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `enter` of the hidden states."""
        return enter(hidden)


def decoder_inputs_of(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return `decoder_inputs` of an encoder-decoder that predicts tokens; None for any other module."""
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder or not model.can_generate():
        return None
    return partial(decoder_inputs, model)


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return the token ids (samples, tokens) from which a decoder predicts `labels`: these, one later, by its rule.

    Where config.json lacks what the rule needs, the first token is the decoder's first, that of a text, or padding.
    """
    try:
        return _shift(model, labels)
    except (AttributeError, TypeError, ValueError):  # of settings that config.json lacks
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        shifted = labels.clamp(min=0).roll(1, dims=1)  # labels below 0 are masked
        shifted[:, 0] = next((value for name in names if (value := _id(model.config, name)) is not None), 0)
        return shifted


def _shift(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return `labels` shifted by the model's own rule."""
    for rule in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, rule):
            return cast(Tensor, getattr(model, rule)(labels))
    shift = sys.modules[type(model).__module__].shift_tokens_right
    values = (labels, model.config.pad_token_id, getattr(model.config, "decoder_start_token_id", None))
    return cast(Tensor, shift(*values[: len(inspect.signature(shift).parameters)]))


def _id(config: object, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None
