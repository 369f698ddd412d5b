"""A checkpoint as transformers itself loads it: its own class, quantizer, names and conversions, a block at a time."""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import transformers
from compressed_tensors.compressors import decompress_module
from compressed_tensors.offload import as_single_threaded
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils.generic import ContextManagers

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import reason
from hesse.networks.encoder_decoder import DecoderEntry
from hesse.networks.layout import NetworkKind, input_limit, kind_of
from hesse.networks.network import Block, Network, forget, list_blocks
from hesse.networks.sources import Names


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the bars and tables of transformers and compressed-tensors, and leave other processes out of loading."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        with redirect_stderr(StringIO()), as_single_threaded():  # by itself compressed-tensors shares it with all
            yield
    finally:
        transformers.logging.set_verbosity(before)


class StoredTensors(Protocol):
    """A folder with a config.json, and tensors by name."""

    folder: Path

    def stored_names(self) -> list[str]:
        """Return the names of the tensors."""

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""


class LoadedNetwork(Network):
    """Network of the model that transformers makes of a folder, with no weights in memory until they are asked for.

    No reader of Hesse takes part: transformers' quantizer builds the layers, and its conversions fill them. What comes
    out is what every program gets that calls `from_pretrained` on the folder. Weights are decoded in the type that
    config.json names, and run in `dtype`. Code in the folder is never run.

    Errors are transformers' own, of any kind.
    """

    def __init__(self, checkpoint: StoredTensors, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        folder = checkpoint.folder
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        factory = getattr(transformers, config.architectures[0])
        stored = config.get_text_config().dtype or torch.float32
        quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})  # type: ignore[no-untyped-call]
        with ContextManagers(factory.get_init_context(stored, quantizer is not None, False, None)):
            model = factory(config)
            if quantizer is not None:
                quantizer.preprocess_model(model=model, dtype=stored, device_map=None, checkpoint_files=[])
        if (compressor := getattr(quantizer, "compressor", None)) is not None:
            compressor.remove_decompression_hook(model)  # `_fill` decompresses, a block at a time
        self.model: PreTrainedModel = model.eval()
        self.kind: NetworkKind = kind_of(model)
        self.gradients_off: Callable[[], AbstractContextManager[object]] = torch.inference_mode
        self.blocks = list_blocks(model, lambda name, module: Block(name, module, ()))  # no layers: they are only run
        names = Names(model, quantizer)
        self._loading = LoadStateDictConfig(
            dtype=stored,
            dtype_plan=model._get_dtype_plan(stored),
            hf_quantizer=quantizer,
            weight_mapping=cast(Any, names.mapping),
            device_map={"": str(device)},
        )
        # The parameter, or the first of several, that each stored tensor fills.
        self._places = {key: names.place(key)[0] for key in checkpoint.stored_names()}

    @property
    def input_limit(self) -> int | None:
        """Return the largest number of tokens of a sample; None without a limit."""
        return input_limit(self.model, "config.json")

    def unmatched(self) -> dict[str, set[str]]:
        """Return the tensors that transformers misses, or does not read, by names, shapes and types alone."""
        stored, trial = self.checkpoint, copy.deepcopy(self.model)
        tensors = {
            name: torch.empty(stored.shape(name), dtype=stored.dtype(name), device="meta")
            for name in stored.stored_names()
        }
        loading = replace(self._loading, device_map={"": "meta"})
        info, _ = convert_and_load_state_dict_in_model(trial, tensors, loading)
        info = type(trial)._finalize_model_loading(trial, loading, info)
        return {
            "has no tensor for": info.missing_keys,
            "does not read": info.unexpected_keys,
            "expects another shape of": {str(key[0]) for key in info.mismatched_keys},
            "cannot convert": set(info.conversion_errors),
        }

    def _place(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        self.model.get_submodule(parent)._modules[child] = module

    @contextmanager
    def loaded(self, block: Block) -> Iterator[nn.Module]:
        """Yield the block with its weights in memory; the block's own module stays without."""
        if isinstance(block.module, DecoderEntry):
            with self.surroundings():
                yield block.module
            return
        module = copy.deepcopy(block.module)
        self._place(block.name, module)
        try:
            self._fill(block.name, module)
            yield module
        finally:
            self._place(block.name, block.module)

    @contextmanager
    def surroundings(self) -> Iterator[PreTrainedModel]:
        """Yield the model with everything except its blocks in memory: embeddings, last norm, head."""
        self._fill("", self.model)
        try:
            yield self.model
        finally:
            forget(self.model)

    def _fill(self, prefix: str, module: nn.Module) -> None:
        """Fill `module`, or with no prefix what lies outside of all blocks, as `from_pretrained` does."""
        blocks = tuple(f"{block.name}." for block in self.blocks)
        inside = {child for block in self.blocks for child in block.module.modules()}
        own = set(module.modules()) if prefix else set(module.modules()) - inside
        names = [
            name
            for name, place in self._places.items()
            if (place.startswith(f"{prefix}.") if prefix else not place.startswith(blocks))
        ]
        assert isinstance(self.checkpoint, Checkpoint)  # not one that is still to be written
        convert_and_load_state_dict_in_model(self.model, self.checkpoint.read_stored(names), self._loading)
        if not prefix:
            self.model.tie_weights()
        parts = prefix.split(".")
        unmarked = own | {self.model.get_submodule(".".join(parts[:length])) for length in range(len(parts))}
        for child in self.model.modules():  # those with the mark keep their buffers; some are computed by a parent
            cast(Any, child)._is_hf_initialized = child not in unmarked
        for child in own:
            child._apply(self._off_meta, recurse=False)  # type: ignore[no-untyped-call]
        self.model.initialize_weights()  # type: ignore[no-untyped-call]
        for child in own:
            if isinstance(getattr(child, "quantization_scheme", None), QuantizationScheme):
                decompress_module(child)  # from_pretrained leaves it to the model's first forward
            child._apply(self._in_dtype, recurse=False)  # type: ignore[no-untyped-call]

    def _off_meta(self, tensor: Tensor) -> Tensor:
        """Return room for a tensor that the files do not hold: transformers initializes it."""
        return torch.empty_like(tensor, device=self.device) if tensor.is_meta else tensor

    def _in_dtype(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def needs_code(config: Mapping[str, Any]) -> bool:
    """True if only code that comes with the model can load it, which is never run here."""
    return "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING


def open_loaded(written: StoredTensors, source: Checkpoint, device: torch.device) -> LoadedNetwork | str:
    """Return the float32 network that transformers makes of `written`, or the reason why it does not load it whole.

    What transformers does not read, or misses, of the `source` either is no obstacle: layers that predict further
    tokens, heads without weights.
    """
    with quiet():
        try:
            loaded = LoadedNetwork(written, torch.float32, device)
            found = loaded.unmatched()
            if any(found.values()):
                known = LoadedNetwork(source, torch.float32, device).unmatched()
                tolerated = {(what, _unnumbered(name)) for what, names in known.items() for name in names}
                found = {w: {n for n in names if (w, _unnumbered(n)) not in tolerated} for w, names in found.items()}
        except Exception as error:  # transformers raises many kinds
            return f"transformers {transformers.__version__} cannot build it: {reason(error)}"
    for what, names in found.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"transformers {transformers.__version__} {what} {min(names)}{more}"
    return loaded


def _unnumbered(name: str) -> str:
    """Return a tensor's name without its numbers: those of blocks change when blocks are removed."""
    return re.sub(r"\d+", "#", name)
