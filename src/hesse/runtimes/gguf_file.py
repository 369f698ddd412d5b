"""Write a checkpoint as one GGUF file, for llama.cpp and programs built on it."""

import math
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.constraints import GridCode
from hesse.constraints.grouped import Scales
from hesse.errors import CheckpointError, UnsupportedModelError, VerificationError
from hesse.formats.codes import read_grid_code
from hesse.networks.families import GgufFamily, family_of
from hesse.progress import Progress
from hesse.runtimes.export_report import ExportedLayer, ExportedTensors
from hesse.runtimes.exported_layers import SourceTensor, check_some_fit, describe_grid, describe_sources, read_config
from hesse.runtimes.gguf_blocks import BLOCK_WEIGHTS, BYTES, block_type, to_blocks
from hesse.runtimes.gguf_families import context_length, describe, find_family, rotary_factors, row_order
from hesse.runtimes.gguf_tokenizer import write_tokenizer

BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
TRANSPOSED = (".c_attn", ".c_proj", ".c_fc")  # the linear layers of GPT-2
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}  # bytes
DENSE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
ALWAYS_FLOAT32 = ("position_embd.weight", "rope_freqs.weight")
NEEDS = f"groups and widths that are multiples of {BLOCK_WEIGHTS}, and fewer than 8 bits where the grid is asymmetric"


@dataclass(frozen=True)
class _Entry:
    """A tensor to write."""

    name: str  # in the file
    source: SourceTensor
    type: str  # of GGUF
    transposed: bool  # (in, out) on disk

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape in the file: (out, in) for a weight."""
        shape = tuple(self.source.shape)
        return shape[::-1] if self.transposed and self.source.grid is None else shape

    @property
    def declared_shape(self) -> tuple[int, ...]:
        """Return the shape for the writer, which counts bytes in the rows of block types."""
        return (self.shape[0], self.shape[1] // BLOCK_WEIGHTS * BYTES[self.type]) if self.type in BYTES else self.shape


def write_gguf(checkpoint: Checkpoint, path: Path, name: str, progress: Progress) -> ExportedTensors:
    """Write `checkpoint` to the file `path`, one tensor at a time, and read the file back.

    Raises:
        UnsupportedModelError: Hesse does not write GGUF of the family.
        OptionError: no layer's codes fit GGUF, or the layers are factorised.
        VerificationError: the file differs from what was to be written.
    """
    config = read_config(checkpoint)
    family = find_family(config)
    entries = _entries(checkpoint, family, config)
    notes = []
    writer = GGUFWriter(None, family.architecture)
    writer.add_name(name)
    describe(writer, family, config)
    context = context_length(config)
    if context < config.max_position_embeddings:
        notes.append(f"the context ends at {context} tokens: beyond, llama.cpp would attend outside the sliding window")
    vocabulary = next(entry.source.shape[0] for entry in entries if entry.name == "token_embd.weight")
    note = write_tokenizer(writer, checkpoint.folder, vocabulary)
    notes += [] if note is None else [note]
    factors = rotary_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
    _declare(writer, entries)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    digests: dict[str, bytes] = {}
    layers: list[ExportedLayer] = []
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
        digests["rope_freqs.weight"] = _digest(factors.numpy())
    progress.begin("export", len(entries))
    try:
        for entry in entries:
            stored, weight, layer = _tensor(checkpoint, entry, row_order(family, entry.source.layer, config))
            writer.write_tensor_data(stored)
            digests[entry.name] = _digest(weight)
            layers += [] if layer is None else [layer]
            progress.advance()
    finally:
        writer.close()
    _read_back(path, digests)
    dense = [entry.type for entry in entries if entry.source.grid is None]
    return ExportedTensors(layers, {kind: dense.count(kind) for kind in dict.fromkeys(dense)}, len(digests), notes)


def _entries(checkpoint: Checkpoint, family: GgufFamily, config: Any) -> list[_Entry]:
    """Return the tensors to write, in the checkpoint's order."""
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    in_out = family_of(config.model_type).transposed
    entries = []
    for source in describe_sources(checkpoint):
        if source.name.endswith(BUFFERS) or source.name == tied:
            continue
        name = names.get_name(source.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(f"llama.cpp has no tensor for {source.name} in {family.architecture}")
        transposed = in_out and source.layer.endswith(TRANSPOSED) and len(source.shape) == 2
        entries.append(_Entry(name, source, _type(source, name), transposed))
    fitting = sum(entry.type in BYTES for entry in entries)
    check_some_fit("GGUF", [entry.source for entry in entries], fitting, NEEDS)
    return entries


def _type(source: SourceTensor, name: str) -> str:
    """Return the GGUF type of a tensor: a block type for codes, else its own; llama.cpp requires vectors in float32."""
    fitting = None if source.grid is None else block_type(source.grid, source.shape[1])
    if fitting is not None:
        return fitting
    if len(source.shape) == 1 or name in ALWAYS_FLOAT32:
        return "F32"
    if source.dtype not in DENSE:
        raise CheckpointError(f"{source.name} has the type {source.dtype}, which GGUF lacks")
    return DENSE[source.dtype]


def _declare(writer: GGUFWriter, entries: list[_Entry]) -> None:
    weights = [entry.type for entry in entries if len(entry.source.shape) > 1]
    common = max(dict.fromkeys(weights), key=weights.count)
    file_type = "ALL_F32" if common == "F32" else f"MOSTLY_{common}"
    writer.add_file_type(int(gguf.LlamaFileType[file_type]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for entry in entries:
        size = math.prod(entry.declared_shape) * (1 if entry.type in BYTES else WIDTHS[entry.type])
        # The writer converts a shape in bytes to one in weights, which would be wrong for types without blocks.
        element = np.dtype(np.uint8 if entry.type in BYTES else np.float32)
        writer.add_tensor_info(entry.name, entry.declared_shape, element, size, GGMLQuantizationType[entry.type])


def _tensor(
    checkpoint: Checkpoint, entry: _Entry, order: Tensor | None
) -> tuple[NDArray[Any], NDArray[np.float32], ExportedLayer | None]:
    """Return an entry's stored array, its decoded values in float32, and its report if the checkpoint holds codes."""
    source = entry.source
    grid = None if source.grid is None else describe_grid(source.grid)
    if entry.type in BYTES:
        assert source.grid is not None and grid is not None
        blocks = to_blocks(source.grid, _reorder_rows(read_grid_code(checkpoint, source.layer), order), entry.type)
        exact = blocks.scale_error == blocks.offset_error == 0
        layer = ExportedLayer(source.layer, grid, entry.type, exact, blocks.scale_error, blocks.offset_error)
        return blocks.stored, blocks.weight, layer
    dense = checkpoint.read([source.name])[source.name]
    dense = dense.T if entry.transposed else dense
    dense = (dense if order is None else dense[order]).contiguous()
    stored = dense.float() if entry.type == "F32" else dense
    array = stored.view(torch.int16).numpy() if stored.dtype == torch.bfloat16 else stored.numpy()
    return array, dense.float().numpy(), None if grid is None else ExportedLayer(source.layer, grid, entry.type, False)


def _reorder_rows(code: GridCode, order: Tensor | None) -> GridCode:
    """Return the code with its rows in the given order."""
    if order is None:
        return code
    zero_point = code.scales.zero_point
    return GridCode(
        code.codes[order], Scales(code.scales.scale[order], None if zero_point is None else zero_point[order])
    )


def _read_back(path: Path, digests: dict[str, bytes]) -> None:
    """Raise VerificationError unless the file, decoded by gguf itself, holds the tensors that were to be written."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if tensors.keys() != digests.keys():
        raise VerificationError(f"the tensors of the written GGUF file are not those of the checkpoint: {path}")
    for name, tensor in tensors.items():
        if _digest(gguf.dequantize(tensor.data, tensor.tensor_type)) != digests[name]:
            raise VerificationError(f"{name} was read back from the written GGUF file with other values")


def _digest(weight: NDArray[np.float32]) -> bytes:
    return blake2b(np.ascontiguousarray(weight, dtype=np.float32).tobytes()).digest()
