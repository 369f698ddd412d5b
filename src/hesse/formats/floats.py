"""The layouts of compressed-tensors for floats of few bits: FP8 in bytes, MXFP4 in half bytes with exponents."""

from typing import Any

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from torch import Tensor

from hesse.constraints import BlockTable, GridCode, Grouped, Microscaled, Table
from hesse.constraints.table import TABLES
from hesse.errors import OptionError
from hesse.formats.base import StoredLayer
from hesse.formats.packed import PackedFormat, Scheme
from hesse.networks.network import CheckpointNetwork

EXPONENT_BIAS = 127


class FloatFormat(PackedFormat):
    """FP8 (E4M3) in bytes, one scale per row or per block; unquantised layers are dense.

    vLLM needs rounded inputs, for which it has FP8 kernels.
    """

    name = "float-quantized"
    layout = "float-quantized"
    table = "fp8"
    tables: tuple[type[Table], ...] = (Table, BlockTable)

    def __init__(self, network: CheckpointNetwork, layers: list[StoredLayer]) -> None:
        super().__init__(network, layers)
        for layer in self.layers.values():
            if layer.constraint is not None and self._grid(layer) is None:
                raise OptionError(f"{layer.name}: {self.name} stores {self._stores()}: use --format auto or dense")
        if self.unpacks_while_loading:
            raise OptionError(f"{next(iter(self.packed))}: {self.name} has no layout for (out, in): use --format dense")

    @classmethod
    def accepts(cls, layer: StoredLayer) -> bool:
        """True if the layout can store the layer's constraint."""
        constraint = layer.constraint
        if type(constraint) is Table and constraint.group_size != -1:
            return False
        return type(constraint) in cls.tables and constraint.name == cls.table  # type: ignore[union-attr]

    def _stores(self) -> str:
        return "tables of fp8 with one scale per row or per block"

    def _grid(self, layer: StoredLayer) -> Grouped | None:
        return layer.constraint if self.accepts(layer) else None  # type: ignore[return-value]

    def _storable(self, layer: StoredLayer) -> StoredLayer:
        return super(PackedFormat, self)._storable(layer)  # blocks at the ends of a row may be narrower

    def _scheme(self, layer: StoredLayer) -> Scheme:
        scheme: Scheme = {"num_bits": 8, "type": "float", "symmetric": True}
        grid = self._grid_of(layer)
        if isinstance(grid, BlockTable):
            return {**scheme, "strategy": "block", "block_structure": [grid.height, grid.group_size]}
        return {**scheme, "strategy": "channel"}

    def _inputs(self, bits: int) -> Scheme:
        return {**super()._inputs(bits), "type": "float"}

    def _check_loadable(self) -> None:
        super()._check_loadable()
        for name, layer in self.packed.items():
            if layer.input_bits not in (None, 8):
                raise OptionError(f"{name}: {self.name} rounds inputs to 8 bits only: use --input-bits 8")

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        if name not in self.packed:
            return super().tensors(name, encoded, weight, bias)
        assert isinstance(encoded, GridCode)
        tensors = {**self.codes(name, encoded.codes), f"{name}.weight_scale": self._stored_scale(name, encoded)}
        return tensors if bias is None else {**tensors, f"{name}.bias": bias}

    def _stored_scale(self, name: str, encoded: GridCode) -> Tensor:
        """Return the scales of a layer as the file holds them."""
        grid = self.grid(name)
        step = grid.height if isinstance(grid, BlockTable) else 1
        return encoded.scales.scale[::step].to(grid.dtype).contiguous()

    def _elements(self, name: str, codes: Tensor) -> Tensor:
        """Return the values of the table that `codes` index."""
        values = torch.tensor(TABLES[self.table], device=codes.device)
        return values[codes.long() + (1 << (self.grid(name).code_bits - 1))]

    def codes(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        return {f"{name}.weight": self._elements(name, codes).to(torch.float8_e4m3fn).contiguous()}

    def stored(self, name: str) -> dict[str, Tensor]:
        if name not in self.packed:
            return super().stored(name)
        grid, (rows, columns) = self.grid(name), self.layers[name].shape
        height = grid.height if isinstance(grid, BlockTable) else 1
        scale = torch.empty((-(-rows // height), grid.groups(columns)), dtype=grid.dtype, device="meta")
        codes = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device="meta")
        return {f"{name}.weight": codes, f"{name}.weight_scale": scale}


class MicroscaledFormat(FloatFormat):
    """MXFP4: two codes a byte, the exponent of a power of two in a byte for 32 columns; other layers are dense."""

    name = "mxfp4-pack-quantized"
    layout = "mxfp4-pack-quantized"
    table = "fp4"
    tables = (Microscaled,)

    @classmethod
    def accepts(cls, layer: StoredLayer) -> bool:
        constraint = layer.constraint
        return super().accepts(layer) and constraint.group_size == 32 and layer.shape[1] % 32 == 0  # type: ignore[union-attr]

    def _stores(self) -> str:
        return "tables of fp4 with a power of two for 32 columns, of layers whose width is a multiple of 32"

    def _scheme(self, layer: StoredLayer) -> Scheme:
        return {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}

    def _input_refusal(self, layer: StoredLayer) -> str | None:
        return "mxfp4-pack-quantized stores weights only"

    def _stored_scale(self, name: str, encoded: GridCode) -> Tensor:
        return (encoded.scales.scale.log2().round() + EXPONENT_BIAS).to(torch.uint8).contiguous()

    def codes(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        return {f"{name}.weight_packed": pack_fp4_to_uint8(self._elements(name, codes)).contiguous()}

    def stored(self, name: str) -> dict[str, Tensor]:
        if name not in self.packed:
            return super().stored(name)
        rows, columns = self.layers[name].shape
        return {
            f"{name}.weight_packed": torch.empty((rows, columns // 2), dtype=torch.uint8, device="meta"),
            f"{name}.weight_scale": torch.empty((rows, columns // 32), dtype=torch.uint8, device="meta"),
        }
