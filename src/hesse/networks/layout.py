"""Layout of a transformers model: its kind and sizes, and its list of blocks."""

import inspect
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from hesse.curvature.losses import input_ids
from hesse.errors import DataError, UnsupportedModelError
from hesse.networks.families import family_of
from hesse.networks.towers import text_model, towers

NetworkKind = Literal["causal-lm", "seq2seq-lm", "encoder"]


def kind_of(model: PreTrainedModel) -> NetworkKind:
    """Return the kind of a model: a language model generates tokens by a head over its vocabulary."""
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not model.config.is_encoder_decoder:
        return "causal-lm"
    head = model.get_output_embeddings() if model.can_generate() else None  # type: ignore[no-untyped-call]
    if head is None:
        return "encoder"
    return "seq2seq-lm" if model.config.is_encoder_decoder else "causal-lm"


def is_language_model(model: nn.Module) -> bool:
    """Return True if a module is a transformers model that reads token ids and predicts tokens."""
    if not isinstance(model, PreTrainedModel) or kind_of(model) == "encoder":
        return False
    return "input_ids" in inspect.signature(model.forward).parameters


def find_stacks(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of blocks with their names, in order: of an encoder-decoder its encoder's and its decoder's.

    Raises:
        UnsupportedModelError: a list has no linear layers, or there is none.
    """
    if not model.config.is_encoder_decoder:
        return [find_blocks(model)]
    halves = model.get_encoder(), model.get_decoder()  # type: ignore[no-untyped-call]
    if any(half is model or half is model.base_model for half in halves):
        raise UnsupportedModelError(f"{type(model).__name__} has no encoder and decoder by the usual names")
    return [_largest_list(model, half) for half in halves]


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the blocks and their name: of the lists in the text model, the one with the most parameters.

    Lists of experts have fewer; those of towers for images or audio do not count.
    """
    return _largest_list(model, text_model(model))


def _largest_list(model: PreTrainedModel, part: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the list of modules in a `part` of a model that has the most parameters, and its name."""
    text = {id(module) for module in part.modules()}
    text -= {id(module) for tower in towers(model).values() for module in tower.modules()}
    lists = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and id(m) in text
    ]
    sized = [(sum(p.numel() for p in m.parameters()), name, m) for name, m in lists]
    if not sized or max(size for size, _, _ in sized) == 0:
        raise UnsupportedModelError(f"{type(model).__name__} is not a list of blocks of linear layers")
    _, name, blocks = max(sized, key=lambda entry: entry[0])
    if not any(isinstance(m, nn.Linear | Conv1D) for m in blocks.modules()):
        raise UnsupportedModelError(f"the blocks {name} of {type(model).__name__} hold no linear layers")
    return name, blocks


def input_limit(model: PreTrainedModel, config_file: str) -> int | None:
    """Return the most tokens that a sample may have, if the architecture has positions for a limited number.

    Raises:
        UnsupportedModelError: the config, which is in `config_file`, does not give a whole number of positions.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is not None and not isinstance(limit, int):
        raise UnsupportedModelError(f"{config_file} has {limit!r} positions, which is not a whole number: correct it")
    if limit and family_of(config.model_type).positions_after_padding:
        limit -= (config.pad_token_id or 0) + 1  # positions start after the padding token's
    return limit


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model knows.

    Raises:
        UnsupportedModelError: transformers does not say which of the model's modules embeds token ids.
    """
    try:
        return len(model.get_input_embeddings().get_parameter("weight"))
    except (AttributeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not embed token ids by one matrix: load it in Python, and give "
            "hesse.compress the model and a DataLoader of dictionaries of its inputs"
        ) from error


def check_ids(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """Raise DataError for a token id outside a model's vocabulary."""
    largest = max(int(input_ids(ids).max()) for ids in batches)
    if largest >= vocabulary(model):
        raise DataError(
            f"the data holds the token id {largest}, but the model knows {vocabulary(model)}: "
            "the tokens come from another tokenizer"
        )
