"""Tensors of a checkpoint as export targets need them: in order, with the grid of each quantised weight."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import read_json
from hesse.constraints import Grid
from hesse.errors import OptionError, UnsupportedModelError, reason
from hesse.formats.codes import is_transposed, stored_grid
from hesse.formats.low_rank import TYPE_PREFIX
from hesse.formats.reading import CompressedCheckpoint


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint."""

    name: str
    shape: torch.Size  # (out, in) for a weight on a grid, else as it is on disk
    dtype: torch.dtype  # of the decoded tensor
    grid: Grid | None

    @property
    def layer(self) -> str:
        """Return the name up to its last dot."""
        return self.name.rpartition(".")[0]


def read_config(checkpoint: Checkpoint) -> Any:
    """Read the configuration of `checkpoint` by transformers, without running code from its folder.

    Raises:
        OptionError: the checkpoint has factorised layers.
        UnsupportedModelError: transformers cannot use the configuration.
    """
    if str(read_json(checkpoint.folder / "config.json").get("model_type")).startswith(TYPE_PREFIX):
        raise OptionError(
            f"{checkpoint.folder} holds factorised layers, which only transformers runs: export a checkpoint "
            "that was compressed with --format dense"
        )
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for settings that make no sense
        raise UnsupportedModelError(f"{checkpoint.folder}/config.json cannot be used: {reason(error)}") from error


def describe_sources(checkpoint: Checkpoint) -> list[SourceTensor]:
    """Return the description of each tensor of `checkpoint`, in order."""
    return [_source(checkpoint, name) for name in checkpoint.names()]


def _source(checkpoint: Checkpoint, name: str) -> SourceTensor:
    layer, _, part = name.rpartition(".")
    grid = stored_grid(checkpoint, layer) if part == "weight" else None
    if grid is not None:
        assert isinstance(checkpoint, CompressedCheckpoint)
        stored = checkpoint.code_shape(layer)
        return SourceTensor(name, stored[::-1] if is_transposed(checkpoint, layer) else stored, grid.dtype, grid)
    quantised = isinstance(checkpoint, CompressedCheckpoint) and checkpoint.is_quantised(layer)
    if name in checkpoint.shard_of and not (quantised and part == "weight"):
        return SourceTensor(name, checkpoint.shape(name), checkpoint.dtype(name), None)
    tensor = checkpoint.read([name])[name]  # codes of another kind
    return SourceTensor(name, tensor.shape, tensor.dtype, None)


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def describe_grid(grid: Grid) -> str:
    """Return a short description of a grid, for messages."""
    width = "rows" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"{grid.bits} bit, {width}, {'symmetric' if grid.symmetric else 'asymmetric'}"


def check_some_fit(target: str, sources: list[SourceTensor], fitting: int, needs: str) -> None:
    """Raise OptionError if the checkpoint has quantised layers and the target can hold none of them exactly."""
    on_grids = [source for source in sources if source.grid is not None]
    if on_grids and not fitting:
        first = on_grids[0]
        assert first.grid is not None
        raise OptionError(
            f"{target} holds none of the {len(on_grids)} quantised layers exactly: it needs {needs}, but {first.layer} "
            f"has {describe_grid(first.grid)} and {first.shape[1]} columns; compress again with another grid"
        )
