"""Build transformers' modules from config.json, without weights; code in the model folder is never run."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hesse.checkpoints.checkpoint import Checkpoint, tensor_bytes
from hesse.checkpoints.config_limits import IMPLEMENTATIONS, SPARE
from hesse.errors import CheckpointError, HesseError, UnsupportedModelError, reason

PARAMETERS_A_TENSOR = 4  # at most: transformers may split one stored tensor
LARGEST_BUFFERS = 1 << 30  # bytes of computed buffers (masks, frequencies) that a model may have beyond its weights
# Settings of config.json that do not describe the architecture: packed weights, code, and implementations.
LEFT_OUT = ("quantization_config", "auto_map", *IMPLEMENTATIONS)


def build(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the architecture that config.json names, with parameters on the meta device and real computed buffers.

    A buffer that a checkpoint must hold has no values, see `unfilled_buffers`.

    Raises:
        UnsupportedModelError: transformers does not have the architecture, or cannot build it with these settings.
        CheckpointError: config.json asks for far more parameters than the files hold.
    """
    stored = checkpoint.names()
    settings = _architecture_settings(checkpoint.config)
    place, model_type = f"{checkpoint.folder}/config.json", settings.get("model_type")
    if not model_type or not isinstance(model_type, str):
        raise UnsupportedModelError(f"{place} names no model_type: it is not a transformers model")
    try:
        config = AutoConfig.for_model(**PreTrainedConfig._decode_special_floats(settings))
        factory = find_architecture(checkpoint.folder, settings)
        _check_takes_ids(factory)
        attention = "sdpa" if factory._supports_sdpa else None
        with _bounded_parameters(checkpoint.folder, len(stored)):
            with torch.device("meta"):
                model: PreTrainedModel = factory._from_config(config, attn_implementation=attention)  # type: ignore[no-untyped-call]
            model.eval()  # type: ignore[no-untyped-call]
            _make_buffers(model, set(stored))
            _compute_buffers(model, LARGEST_BUFFERS + checkpoint.stored_bytes)
    except HesseError:
        raise
    except Exception as error:  # transformers and torch raise many kinds for settings that make no sense
        raise UnsupportedModelError(f"{place} cannot be used: {reason(error)}") from error
    return model


def find_architecture(folder: Path, config: dict[str, Any]) -> type[PreTrainedModel]:
    """Return the class of transformers that the config of the model in `folder` names.

    Raises:
        UnsupportedModelError: transformers does not have the class.
    """
    names = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))]
    name = names[0] if isinstance(names, list) else None
    factory = getattr(transformers, str(name), None)
    if not (isinstance(factory, type) and issubclass(factory, PreTrainedModel)):
        raise UnsupportedModelError(
            f"{folder}/config.json names the architecture {name}, which transformers {transformers.__version__} does "
            "not have: a newer transformers may"
        )
    return factory


def _check_takes_ids(factory: type[PreTrainedModel]) -> None:
    """Raise UnsupportedModelError for a model of images or sounds, which calibration text does not give."""
    if "input_ids" not in inspect.signature(factory.forward).parameters:
        raise UnsupportedModelError(
            f"{factory.__name__} takes {factory.main_input_name}, not token ids: load it in Python, and give "
            "hesse.compress the model and a DataLoader of dictionaries of its inputs"
        )


def _make_buffers(model: PreTrainedModel, stored: set[str]) -> None:
    """Make buffers of the parameters that transformers computes and never saves: Marian's positions."""
    for full in set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - stored:
        path, _, name = full.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters.pop(name, None)
        if parameter is not None:
            module.register_buffer(name, parameter.detach(), persistent=False)


def _compute_buffers(model: PreTrainedModel, most: int) -> None:
    """Compute the buffers that checkpoints do not store; raise if they need more than `most` bytes."""
    computed = {
        module: {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for module in model.modules()
    }
    needed = sum(tensor_bytes(b.shape, b.dtype) for buffers in computed.values() for b in buffers.values())
    if needed > most:
        raise UnsupportedModelError(
            f"{type(model).__name__} as config.json describes it computes buffers of {needed:,} bytes, far more than "
            "its weights: correct its sizes, such as the number of positions"
        )
    needed_modules = {module for module in model.modules() if any(computed[child] for child in module.modules())}
    for module, buffers in computed.items():
        for name, buffer in buffers.items():
            module._buffers[name] = _unfilled(buffer)
        cast(Any, module)._is_hf_initialized = module not in needed_modules
    model.initialize_weights()  # type: ignore[no-untyped-call]
    for module in computed:
        del cast(Any, module)._is_hf_initialized


def unfilled_buffers(model: PreTrainedModel) -> list[str]:
    """Return the names of the buffers of a model from `build` that transformers did not compute."""
    return [
        name
        for name, buffer in model.named_buffers()
        if buffer.numel() and buffer.dtype != torch.bool and _same(buffer, _unfilled(buffer))
    ]


def _unfilled(buffer: Tensor) -> Tensor:
    """Return values of the shape of `buffer` that none computes: NaN, or the smallest integer."""
    if buffer.is_floating_point() or buffer.is_complex():
        return torch.full_like(buffer, torch.nan, device="cpu")
    least = False if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).min
    return torch.full_like(buffer, least, device="cpu")


def _same(buffer: Tensor, unfilled: Tensor) -> bool:
    return bool(buffer.isnan().all()) if buffer.is_floating_point() else torch.equal(buffer.cpu(), unfilled)


def _architecture_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that describe the architecture, without those of compressed weights at any depth."""
    return {
        key: _architecture_settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in LEFT_OUT
    }


@contextmanager
def _bounded_parameters(folder: Path, tensors: int) -> Iterator[None]:
    """Limit the parameters of models built inside to what files with `tensors` tensors can fill.

    Raises:
        CheckpointError: a model has more parameters.
    """
    limit, built = PARAMETERS_A_TENSOR * tensors + SPARE, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Tensor | None:
        nonlocal built
        built += 1
        if built > limit:
            raise CheckpointError(
                f"{folder}/config.json describes more than {limit} parameters, but the files hold {tensors} tensors: "
                "config and weights do not belong together"
            )
        return None

    with register_module_parameter_registration_hook(count):  # type: ignore[arg-type]
        yield
