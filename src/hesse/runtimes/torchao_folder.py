"""Write a checkpoint as torchao tensors, 4-bit or 8-bit, which transformers runs on a CPU."""

from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int8Tensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import read_json
from hesse.checkpoints.output import copy_companions
from hesse.checkpoints.writer import write_text
from hesse.constraints import Grid, GridCode
from hesse.errors import CheckpointError, UnsupportedModelError, VerificationError
from hesse.formats.codes import is_transposed, read_grid_code
from hesse.networks.architecture import find_architecture
from hesse.networks.families import is_expert
from hesse.progress import Progress
from hesse.runtimes.export_report import ExportedLayer, ExportedTensors
from hesse.runtimes.exported_layers import SourceTensor, check_some_fit, describe_grid, describe_sources, read_config

WEIGHTS = "model.pt"
KERNEL_GROUPS = (32, 64, 128, 256)  # columns
KERNEL_ROWS = 16  # a multiple of these
NEEDS = "4 bits or fewer in groups of 32, 64, 128 or 256, or a symmetric grid"


def write_torchao(checkpoint: Checkpoint, folder: Path, name: str, progress: Progress) -> ExportedTensors:
    """Write `checkpoint` into `folder`, for `load_torchao`, and read it back; all stored tensors are held in memory.

    Raises:
        UnsupportedModelError: the model is a mixture of experts, which transformers keeps in fused tensors.
        OptionError: no layer's codes fit torchao, or the layers are factorised.
        VerificationError: the files differ from what was to be written.
    """
    config = read_config(checkpoint)
    sources = describe_sources(checkpoint)
    if any(is_expert(source.name) for source in sources):
        raise UnsupportedModelError(f"{config.model_type} has experts, which the torchao exporter does not support")
    kinds = {source.layer: kind for source in sources if (kind := _kind(checkpoint, source)) is not None}
    check_some_fit("torchao", sources, len(kinds), NEEDS)
    layers: list[ExportedLayer] = []
    tensors: dict[str, Tensor] = {}
    progress.begin("export", len(sources))
    for source in sources:
        kind = kinds.get(source.layer) if source.grid is not None else None
        if source.grid is None or kind is None:
            tensors[source.name] = checkpoint.read([source.name])[source.name]
        if source.grid is not None:
            offset_error = 0.0
            if kind is not None:
                code = read_grid_code(checkpoint, source.layer)
                tensors[source.name], offset_error = to_tensor(source.grid, code, kind)
            stored = kind or str(source.dtype).removeprefix("torch.")
            exact = kind is not None and offset_error == 0
            grid = describe_grid(source.grid)
            layers.append(ExportedLayer(source.layer, grid, stored, exact, offset_error=offset_error))
        progress.advance()
    torch.save(tensors, folder / WEIGHTS)
    _read_back(folder / WEIGHTS, tensors)
    notes = copy_companions(checkpoint.folder, folder)
    plain = config.to_dict()
    plain.pop("quantization_config", None)
    write_text(folder / "config.json", type(config).from_dict(plain).to_json_string())
    dense = [str(s.dtype).removeprefix("torch.") for s in sources if s.grid is None]
    return ExportedTensors(layers, {kind: dense.count(kind) for kind in dict.fromkeys(dense)}, len(tensors), notes)


def load_torchao(folder: Path) -> PreTrainedModel:
    """Load the model that `write_torchao` wrote into `folder`, on the CPU.

    Raises:
        CheckpointError: the folder is not an export to torchao, or is incomplete.
        UnsupportedModelError: transformers does not have its architecture.
    """
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}: give a folder that was exported to torchao")
    architecture = find_architecture(folder, read_json(folder / "config.json"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tensors = torch.load(folder / WEIGHTS, weights_only=True)
    with no_init_weights():
        model: PreTrainedModel = architecture._from_config(config, dtype=config.dtype)  # type: ignore[no-untyped-call]
    missing, unknown = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    if unknown or set(missing) - tied:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit {architecture.__name__}: export the model again")
    model.train(False)
    model.requires_grad_(False)
    return model


def _kind(checkpoint: Checkpoint, source: SourceTensor) -> str | None:
    """Return the name of the tensor class that holds a layer's codes; None if no class does."""
    grid = source.grid
    if grid is None or is_transposed(checkpoint, source.layer):
        return None
    rows, columns = source.shape
    width = grid.group_width(columns)
    if grid.bits <= 4 and width in KERNEL_GROUPS and columns % width == 0 and rows % KERNEL_ROWS == 0:
        return str(Int4OpaqueTensor.__name__)
    return str(Int8Tensor.__name__) if grid.symmetric and columns % width == 0 else None


def to_tensor(grid: Grid, code: GridCode, kind: str) -> tuple[Tensor, float]:
    """Return a layer as a torchao tensor of class `kind`, and the largest change of an offset in steps of the grid.

    The 4-bit kernel computes (code - 8) · scale + offset, with the offset rounded to the type of the scales.
    """
    rows, columns = code.codes.shape
    width = grid.group_width(columns)
    scale = code.scales.scale.to(grid.dtype)
    if kind == Int8Tensor.__name__:
        return Int8Tensor(code.codes.contiguous(), scale.contiguous(), [1, width], grid.dtype), 0.0
    exact = torch.zeros_like(code.scales.scale)
    if code.scales.zero_point is not None:
        exact = -code.scales.zero_point.double() * code.scales.scale.double()
    offset = exact.to(grid.dtype)
    error = float(((offset.double() - exact).abs() / code.scales.scale).max())
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code.codes.to(torch.int32) + 8, 1)
    both = pack_tinygemm_scales_and_zeros(scale, offset, grid.dtype)
    return Int4OpaqueTensor(packed, both, [1, width], torch.Size((rows, columns))), error


def _read_back(path: Path, written: dict[str, Tensor]) -> None:
    """Raise VerificationError unless `path` holds the tensors `written`."""
    stored = torch.load(path, weights_only=True)
    for name, tensor in written.items():
        if name not in stored or _digests(stored[name]) != _digests(tensor):
            raise VerificationError(f"{name} was read back from the written torchao file with other values")


def _digests(tensor: Tensor) -> list[bytes]:
    """Return a digest of each plain tensor that a tensor consists of."""
    parts = [getattr(tensor, part) for part in getattr(tensor, "tensor_data_names", ())] or [tensor]
    return [blake2b(part.contiguous().view(torch.uint8).numpy().tobytes()).digest() for part in parts]
