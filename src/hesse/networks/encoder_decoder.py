"""Encoder-decoders: the step between their two lists of blocks, and the token ids that their decoder reads."""

import inspect
import sys
from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel

from hesse.errors import UnsupportedModelError


class DecoderEntry(nn.Module):
    """Step from the output of an encoder's last block to the input of a decoder's first, among a network's blocks."""

    def forward(self, hidden: Tensor, enter: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `enter` of the hidden states."""
        return enter(hidden)


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Return the token ids (samples, tokens) from which the decoder predicts `labels`: by the model's rule, one later.

    Raises:
        UnsupportedModelError: config.json does not say which token is first.
    """
    config = model.config
    first = next(
        (value for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id") if (value := _id(config, name))),
        0,
    )
    if _id(config, "decoder_start_token_id") is None or _id(config, "pad_token_id") is None:
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = first
        return shifted
    for rule in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, rule):
            return _checked(model, getattr(model, rule)(labels))
    shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    if shift is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no rule for the tokens that its decoder reads")
    values = (labels, config.pad_token_id, config.decoder_start_token_id)
    return _checked(model, shift(*values[: len(inspect.signature(shift).parameters)]))


def _id(config: object, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _checked(model: PreTrainedModel, found: object) -> Tensor:
    assert isinstance(found, Tensor), f"{type(model).__name__} shifts token ids to {type(found).__name__}"
    return found
