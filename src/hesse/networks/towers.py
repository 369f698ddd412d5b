"""Roles of the models inside a model: the one that reads and predicts text, and the towers for images or audio."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


def text_model(model: PreTrainedModel) -> nn.Module:
    """Return the module that processes text: a decoder inside a model of several kinds of input, else the model."""
    config = _text_config(model)
    if config is model.config:
        return model
    try:
        decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    except (AttributeError, NotImplementedError):  # of classes that have none by any of the usual names
        decoder = model
    if isinstance(decoder, PreTrainedModel) and decoder is not model and decoder.config.model_type == config.model_type:
        return decoder
    inner = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model)
    return next((m for m in inner if type(m.config) is type(config)), model)


def towers(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return the models inside `model` that never see text, by name: encoders of images, audio, proteins, ..."""
    if model.config.is_encoder_decoder:
        return {}
    text, config = text_model(model), _text_config(model)
    above = {id(module) for module in model.modules() if any(child is text for child in module.modules())}
    inside = {id(module) for module in text.modules()} if text is not model else set()
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module) in above or id(module) in inside:
            continue
        own = type(module.config) not in (type(config), type(model.config))
        if own and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def linear_weights(module: nn.Module) -> int:
    """Return the number of weights of all linear layers in `module`."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | Conv1D))


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep a model and all models inside it from making caches, whatever their configurations say."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config.use_cache) for config in configs.values() if "use_cache" in vars(config)]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of the text decoder; the model's own if it has no other."""
    try:
        return model.config.get_text_config(decoder=True)
    except ValueError:  # of several decoders none is the text's
        return model.config
