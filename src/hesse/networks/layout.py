"""Layout of a transformers model: its kind and sizes, its list of blocks, and the names of its parameters on disk."""

from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from hesse.curvature.losses import input_ids
from hesse.errors import DataError, UnsupportedModelError
from hesse.networks.families import family_of
from hesse.networks.towers import text_model, towers

NetworkKind = Literal["causal-lm", "encoder"]


def kind_of(model: PreTrainedModel) -> NetworkKind:
    """Return the kind of a model: a language model generates tokens by a head over its vocabulary."""
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal-lm"
    if not model.can_generate() or model.config.is_encoder_decoder:
        return "encoder"
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return "encoder" if head is None else "causal-lm"


def is_language_model(model: nn.Module) -> bool:
    """Return True if a module is a transformers model that predicts the next token."""
    return isinstance(model, PreTrainedModel) and kind_of(model) == "causal-lm"


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the blocks and their name: of the lists in the text model, the one with the most parameters.

    Lists of experts have fewer; those of towers for images or audio do not count.
    """
    text = {id(module) for module in text_model(model).modules()}
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


def sources_of(model: PreTrainedModel, stored: list[str]) -> dict[str, str]:
    """Return the checkpoint's name of each parameter and buffer of `model` that it holds, including tied ones."""
    expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    expected |= {name for name, _ in model.named_buffers()}
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."
    sources: dict[str, str] = {}
    for key in stored:
        renamed = key
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for name in (key, renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if name in expected:
                sources.setdefault(name, key)
                break
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for name, original in tied.items():
        if name not in sources and original in sources:
            sources[name] = sources[original]
        elif original not in sources and name in sources:
            sources[original] = sources[name]
    return sources


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
    """Return the number of token ids that a model knows."""
    return len(model.get_input_embeddings().get_parameter("weight"))


def check_ids(model: PreTrainedModel, batches: list[Tensor]) -> None:
    """Raise DataError for a token id outside a model's vocabulary."""
    largest = max(int(input_ids(ids).max()) for ids in batches)
    if largest >= vocabulary(model):
        raise DataError(
            f"the data holds the token id {largest}, but the model knows {vocabulary(model)}: "
            "the tokens come from another tokenizer"
        )
