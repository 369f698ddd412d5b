"""Write a checkpoint as a folder with an ONNX model that onnxruntime runs on a CPU, in 4 and 8 bits."""

from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.output import copy_companions
from hesse.checkpoints.writer import write_text
from hesse.errors import UnsupportedModelError, VerificationError
from hesse.formats.codes import read_grid_code
from hesse.networks.families import FAMILIES, family_of
from hesse.progress import Progress
from hesse.runtimes.export_report import ExportedLayer, ExportedTensors
from hesse.runtimes.exported_layers import SourceTensor, check_some_fit, describe_grid, describe_sources, read_config
from hesse.runtimes.onnx_blocks import block_width, stored_bits, to_nbits
from hesse.runtimes.onnx_graph import OPSETS, OWN, GraphBuilder, build_graph

ROTARY = ("default", "linear", "llama3", "yarn")
MODEL, DATA = "model.onnx", "model.onnx.data"
ALIGNMENT = 4096  # so that the file can be mapped into memory
INT8_PRODUCTS = 4  # accuracy level: inputs are rounded to 8 bits, block by block
NEEDS = "groups whose size is a multiple of 16"


def write_onnx(checkpoint: Checkpoint, folder: Path, name: str, progress: Progress) -> ExportedTensors:
    """Write `checkpoint` into `folder`, one tensor at a time, and read the files back.

    Raises:
        UnsupportedModelError: Hesse does not write the graph of the family.
        OptionError: no layer's codes fit MatMulNBits, or the layers are factorised.
        VerificationError: the files differ from what was to be written.
    """
    config = read_config(checkpoint)
    _check_family(config)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    sources = [s for s in describe_sources(checkpoint) if s.name != tied and not s.name.endswith(".inv_freq")]
    widths = {s.layer: width for s in sources if s.grid and (width := block_width(s.grid, s.shape[1])) is not None}
    check_some_fit("MatMulNBits", sources, len(widths), NEEDS)
    weights = _Weights(checkpoint, {source.name: source for source in sources}, widths)
    graph = build_graph(config, weights.product, {source.name for source in sources}, weights.builder)
    progress.begin("export", len(sources))
    with (folder / DATA).open("wb") as file:
        for source in sources:
            weights.write(source, file)
            progress.advance()
        for kind, table in _rotary_tables(config).items():
            weights.add(kind, table, file)
    graph.initializer.extend(weights.tensors)
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="hesse", doc_string=name, ir_version=10)
    onnx.save(model, folder / MODEL)
    notes = copy_companions(checkpoint.folder, folder)
    write_text(folder / "config.json", config.to_json_string())
    _read_back(folder, weights.digests)
    dense = sum(source.layer not in widths for source in sources)
    return ExportedTensors(weights.layers, {"float32": dense}, len(weights.digests), notes)


class _Weights:
    """Constants of a graph, written one after the other into one file."""

    def __init__(self, checkpoint: Checkpoint, sources: dict[str, SourceTensor], widths: dict[str, int]) -> None:
        self.checkpoint, self.sources, self.widths = checkpoint, sources, widths
        self.builder = GraphBuilder()
        self.tensors: list[TensorProto] = []
        self.digests: dict[str, bytes] = {}
        self.layers: list[ExportedLayer] = []

    def product(self, inputs: str, layer: str) -> str:
        """Add the nodes of a linear layer, and return the name of its output."""
        source, output = self.sources[f"{layer}.weight"], f"{layer}.out"
        if layer in self.widths:
            assert source.grid is not None
            constants = [f"{layer}.codes", f"{layer}.scales", *([] if source.grid.symmetric else [f"{layer}.zeros"])]
            self.builder.add(
                "MatMulNBits",
                [inputs, *constants],
                output,
                OWN,
                K=source.shape[1],
                N=source.shape[0],
                bits=stored_bits(source.grid),
                block_size=self.widths[layer],
                accuracy_level=INT8_PRODUCTS,
            )
        else:
            self.builder.add("FusedMatMul", [inputs, source.name], output, OWN, transB=1)
        if f"{layer}.bias" in self.sources:
            output = self.builder.add("Add", [output, f"{layer}.bias"], f"{layer}.sum")
        return output

    def write(self, source: SourceTensor, file: BinaryIO) -> None:
        """Write a tensor of the checkpoint."""
        if source.layer in self.widths and source.name.endswith(".weight"):
            assert source.grid is not None
            code = read_grid_code(self.checkpoint, source.layer)
            stored = to_nbits(source.grid, code, self.widths[source.layer])
            self.add(f"{source.layer}.codes", stored.codes.numpy(), file)
            self.add(f"{source.layer}.scales", stored.scales.numpy(), file)
            if stored.zero_points is not None:
                self.add(f"{source.layer}.zeros", stored.zero_points.numpy(), file)
            kind = f"MatMulNBits, {stored.bits} bit, blocks of {stored.block}"
            self.layers.append(ExportedLayer(source.layer, describe_grid(source.grid), kind, exact=True))
            return
        self.add(source.name, self.checkpoint.read([source.name])[source.name].float().numpy(), file)
        if source.grid is not None:
            self.layers.append(ExportedLayer(source.layer, describe_grid(source.grid), "float32", exact=False))

    def add(self, name: str, values: NDArray[Any], file: BinaryIO) -> None:
        """Write a constant, and record its place in the file."""
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        data = np.ascontiguousarray(values).tobytes()
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", file.tell()), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))
        file.write(data)
        self.tensors.append(tensor)
        self.digests[name] = blake2b(data).digest()


def _check_family(config: Any) -> None:
    """Raise UnsupportedModelError unless the graph computes the model."""
    if not family_of(config.model_type).onnx:
        known = [name for name, family in FAMILIES.items() if family.onnx]
        raise UnsupportedModelError(
            f"ONNX of the family {config.model_type!r} is not written; the families are {', '.join(known)}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(f"config.json has hidden_act {config.hidden_act!r}, but the graph has 'silu'")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ROTARY:
        raise UnsupportedModelError(f"rotary positions of the type {kind!r} are not written; {', '.join(ROTARY)} are")


def _rotary_tables(config: Any) -> dict[str, NDArray[np.float32]]:
    """Return cos and sin of each position and frequency, (positions, head // 2), by transformers' own rule."""
    positions = torch.arange(config.max_position_embeddings)[None]
    tables = LlamaRotaryEmbedding(config)(torch.empty(1, dtype=torch.float32), positions)
    half = tables[0].shape[-1] // 2  # both halves of a head rotate by the same angles
    return {kind: table[0, :, :half].numpy() for kind, table in zip(("cos", "sin"), tables, strict=True)}


def _read_back(folder: Path, digests: dict[str, bytes]) -> None:
    """Raise VerificationError unless the constants on disk equal those that were to be written."""
    for tensor in onnx.load(folder / MODEL, load_external_data=False).graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / DATA).open("rb") as file:
            file.seek(int(place["offset"]))
            if blake2b(file.read(int(place["length"]))).digest() != digests[tensor.name]:
                raise VerificationError(f"{tensor.name} was read back from the written ONNX model with other values")
