"""A checkpoint as transformers itself loads it: its class, quantizer, names and conversions, one block in memory."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import ContextManagers, LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils.loading_report import LoadStateDictInfo

from hesse.networks.layout import NetworkKind, find_blocks, kind_of
from hesse.networks.network import Block, Layer, input_limit


class LoadedNetwork:
    """Network of the model that transformers makes of a folder.

    Nothing here reads a format: transformers' quantizer builds the layers, and its conversions fill them. So what comes
    out is what every program gets that loads the folder with `from_pretrained`.

    Raises:
        Exception: transformers refuses the folder; the kind of error is transformers' own.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        config = AutoConfig.from_pretrained(folder)
        factory = getattr(transformers, config.architectures[0])
        quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})
        with ContextManagers(factory.get_init_context(dtype, quantizer is not None, False, None)):
            model = factory(config)
            if quantizer is not None:
                quantizer.preprocess_model(model=model, dtype=dtype, device_map=None, checkpoint_files=[])
        self.model: PreTrainedModel = model.eval()
        self.kind: NetworkKind = kind_of(model)
        self.gradients_off: Callable[[], AbstractContextManager[object]] = torch.inference_mode
        self.blocks_return_tuples: bool | None = None
        self._loading = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            hf_quantizer=quantizer,
            weight_mapping=get_model_conversion_mapping(model, None, quantizer),
            device_map={"": str(device)},
        )
        name, blocks = find_blocks(model)
        self.blocks = [Block(f"{name}.{index}", block, ()) for index, block in enumerate(blocks)]
        self._files = {key: path for path in sorted(folder.glob("*.safetensors")) for key in _keys(path)}
        self._targets = self._targets_of(list(self._files))
