"""A network as a list of blocks, with no weights in memory until a block is loaded."""

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.read_ahead import ReadAhead
from hesse.errors import CheckpointError, DataError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.networks.allocator import give_back_memory
from hesse.networks.architecture import build, unfilled_buffers
from hesse.networks.encoder_decoder import DecoderEntry
from hesse.networks.experts import LinearExperts
from hesse.networks.families import ROUTERS
from hesse.networks.layout import NetworkKind, find_stacks, input_limit, kind_of
from hesse.networks.output_form import OutputForm
from hesse.networks.sources import Sources, check_shape
from hesse.networks.towers import towers

SMALLEST = 16  # rows and columns of a layer that is compressed
TRIMMED_BYTES = 1 << 24  # a block of at least this size is worth the milliseconds that trimming the allocator takes

Places = dict[str, tuple[nn.Module, str]]  # by full name: a parameter's or buffer's module, and its name there


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer inside a block; `name` is the name of its tensors in the checkpoint, without `.weight`.

    A convolution counts as the matrix (out, in · kernel) that multiplies its patches.
    """

    name: str
    module: nn.Module
    path: str = ""  # of the module in the model that transformers loads; of an expert's matrix: of all experts

    @property
    def weight_name(self) -> str:
        """Return the name of the layer's weight."""
        return f"{self.name}.weight"

    @property
    def transposed(self) -> bool:
        """True if the weight is kept as (in, out), as in GPT-2."""
        return isinstance(self.module, Conv1D)

    @property
    def parameter(self) -> Tensor:
        """Return the weight as the module stores it."""
        return cast(Tensor, self.module.weight)

    @property
    def weight(self) -> Tensor:
        """Return the weight as (out, in)."""
        return self.parameter.T if self.transposed else self.parameter.flatten(1)

    def replace(self, weight: Tensor) -> None:
        """Replace the weight by `weight` (out, in), in the present type."""
        changed = (weight.T if self.transposed else weight.view(self.parameter.shape)).to(self.parameter)
        self.module.weight = nn.Parameter(changed.contiguous(), requires_grad=False)


@dataclass(frozen=True, eq=False)
class Block:
    """One of the repeated blocks of a network."""

    name: str
    module: nn.Module
    layers: tuple[Layer, ...]


class Blocks(Protocol):
    """Blocks of layers in order: the part of a network that calibration needs."""

    blocks: list[Block]
    gradients_off: Callable[[], AbstractContextManager[object]]  # the context that calibration runs the blocks in

    def loaded(self, block: Block) -> AbstractContextManager[nn.Module]:
        """Return a context in which the block's weights are in memory."""


class Network(Blocks, Protocol):
    """A transformers model as blocks of layers, streamed from a checkpoint or held in memory."""

    model: PreTrainedModel
    kind: NetworkKind
    dtype: torch.dtype
    device: torch.device
    output_forms: list[OutputForm] | None = None  # of the blocks; settled when the first batch is recorded

    @property
    def layers(self) -> list[Layer]:
        """Return all linear layers of all blocks."""
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def decoder_entry(self) -> int | None:
        """Return the number of the block between an encoder's and a decoder's; None for one list of blocks."""
        entries = (n for n, block in enumerate(self.blocks) if isinstance(block.module, DecoderEntry))
        return next(entries, None)

    @property
    def input_limit(self) -> int | None:
        """Return the largest number of tokens of a sample; None without a limit."""

    def surroundings(self) -> AbstractContextManager[PreTrainedModel]:
        """Return a context in which everything except the blocks is in memory."""


def list_blocks(model: PreTrainedModel, block: Callable[[str, nn.Module], Block]) -> list[Block]:
    """Return the blocks of a model, each made by `block` of its name and module, in the order of its forward.

    Between an encoder's blocks and a decoder's stands a block without layers, a DecoderEntry.
    """
    stacks = [[block(f"{name}.{i}", module) for i, module in enumerate(own)] for name, own in find_stacks(model)]
    first, *others = stacks
    for other in others:
        first += [Block("the decoder's entry", DecoderEntry(), ()), *other]
    return first


def each_loaded(network: Blocks, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, Block]]:
    """Yield each block of a network with its number, its weights in memory until the next is asked for.

    `numbers` choose other blocks than all of them in order.
    """
    for number in range(len(network.blocks)) if numbers is None else numbers:
        with network.loaded(network.blocks[number]):
            yield number, network.blocks[number]


class CheckpointNetwork(Network):
    """Network streamed from a checkpoint: modules on the meta device, blocks, and the source of each parameter.

    Raises:
        UnsupportedModelError: the architecture is unknown to transformers, or not a list of blocks of linear layers.
        CheckpointError: the checkpoint lacks tensors that the architecture needs.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._passed = -1  # the block that was loaded last
        self._holders: list[CheckpointNetwork] = []  # networks of the same modules that have weights in memory now
        self.model = build(checkpoint)
        self.tensors = Sources(checkpoint, self.model)
        self._reader = ReadAhead(self.tensors, device)
        self.kind = kind_of(self.model)
        self.gradients_off = torch.inference_mode  # faster than no_grad
        self.sources = self.tensors.names
        checkpoint.paths = {
            source.removesuffix(".weight"): name.removesuffix(".weight")
            for name, source in reversed(self.sources.items())
            if name.endswith(".weight")
        }
        self.blocks = list_blocks(self.model, self._block)
        self._check_complete()
        for path, module in self.model.named_modules():
            source = self.sources.get(f"{path}.weight", "")
            rounding = checkpoint.input_rounding(source.removesuffix(".weight"))
            if rounding is not None and isinstance(module, nn.Linear):  # a loader rounds its inputs
                module.register_forward_pre_hook(partial(_round_inputs, rounding))

    def in_dtype(self, dtype: torch.dtype) -> "CheckpointNetwork":
        """Return a network of the same modules whose weights are loaded as `dtype`.

        Only one of the two may have weights in memory at a time: `loaded` and `surroundings` refuse the other.
        """
        other = copy(self)
        other.dtype = dtype
        return other

    def _block(self, name: str, module: nn.Module) -> Block:
        layers, path = [], name
        for child, linear in module.named_modules(prefix=name):
            if isinstance(linear, LinearExperts):
                path = child
            if not isinstance(linear, nn.Linear | Conv1D):
                continue
            tensor = self.sources.get(f"{child}.weight", f"{child}.weight").removesuffix(".weight")
            layer = Layer(tensor, linear, path if child.startswith(f"{path}.") and path != name else child)
            if reason_to_leave(child.removeprefix(f"{name}."), layer.weight.shape) is None:
                layers.append(layer)
        return Block(name, module, tuple(layers))

    def _check_complete(self) -> None:
        blocks = tuple(f"{block.name}." for block in self.blocks)
        for name, _ in self.model.named_parameters():
            source = self.sources.get(name)
            if source is None and name.startswith(blocks):
                raise CheckpointError(
                    f"{self.checkpoint.folder} has no tensor for {name} of {type(self.model).__name__}: the folder is "
                    "incomplete, or transformers converts this architecture in a way that Hesse does not support"
                )

        empty = [name for name in unfilled_buffers(self.model) if name not in self.sources]
        if empty:
            raise UnsupportedModelError(
                f"transformers computes no values for the buffer {empty[0]} of {type(self.model).__name__}, and "
                f"{self.checkpoint.folder} has no tensor for it: a newer transformers may"
            )

    def stored_in(self, block: Block) -> list[str]:
        """Return the checkpoint's names of the tensors of a block."""
        names = dict.fromkeys(self.sources[name] for name in self.sources if name.startswith(f"{block.name}."))
        return list(dict.fromkeys(key for name in names for key in self.tensors.keys(name)))

    def check_layers_stored(self) -> None:
        """Check that each layer is a tensor of the checkpoint.

        Raises:
            UnsupportedModelError: a layer is stored as a part of a larger tensor.
        """
        for layer in self.layers:
            if not self.tensors.is_stored(layer.weight_name):
                raise UnsupportedModelError(
                    f"{layer.name} is a part of {self.tensors.keys(layer.weight_name)[0]} in {self.checkpoint.folder}: "
                    "only hesse compress changes parts of tensors"
                )

    @property
    def input_limit(self) -> int | None:
        """Return the largest number of tokens of a sample; None without a limit.

        Raises:
            UnsupportedModelError: config.json does not give a whole number of positions.
        """
        return input_limit(self.model, f"{self.checkpoint.folder}/config.json")

    @contextmanager
    def loaded(self, block: Block) -> Iterator[nn.Module]:
        """Yield the block with its weights in memory; drop them afterwards.

        During the computation the next block is read from disk: blocks are expected in order, in either direction.
        """
        if isinstance(block.module, DecoderEntry):
            with self.surroundings():
                yield block.module
            return
        with self._holding_weights(block.name, block.module, block.name):
            self._announce_next(block)
            yield block.module
        if sum(parameter.nbytes for parameter in block.module.parameters()) >= TRIMMED_BYTES:
            give_back_memory()

    @contextmanager
    def _holding_weights(
        self, what: str, module: nn.Module, prefix: str, leave: Set[int] = frozenset()
    ) -> Iterator[None]:
        """Hold the weights below `module`; refuse while a network of another type holds some in the shared modules.

        Raises:
            RuntimeError: another network holds weights.
        """
        if other := next((holder for holder in self._holders if holder is not self), None):
            raise RuntimeError(
                f"{what} cannot be loaded as {self.dtype} while the same modules hold weights as {other.dtype}: leave "
                "the `with` block of that network first"
            )
        self._holders.append(self)
        try:
            self._fill(module, prefix, leave)
            yield
        finally:
            forget(module)
            self._holders.pop()

    @contextmanager
    def surroundings(self) -> Iterator[PreTrainedModel]:
        """Yield the model with everything except its blocks and towers in memory: embeddings, last norm, head."""
        with _empty(towers(self.model).values(), self.device) as absent:
            inside = {id(p) for block in self.blocks for p in (*block.module.parameters(), *block.module.buffers())}
            inside |= absent
            outside = self.model.base_model if self.kind == "encoder" else self.model
            prefix = next((name for name, module in self.model.named_modules() if module is outside), "")
            with self._holding_weights("the embeddings and the head", outside, prefix, leave=inside):
                yield self.model

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """Yield the model with all its weights in memory, for computations that need all blocks."""
        with ExitStack() as stack:
            model = stack.enter_context(self.surroundings())
            for block in self.blocks:
                stack.enter_context(self.loaded(block))
            yield model

    def _announce_next(self, block: Block) -> None:
        index = self.blocks.index(block)
        following = index + (1 if index >= self._passed else -1)
        self._passed = index
        if 0 <= following < len(self.blocks):
            places = self._places(self.blocks[following].module, self.blocks[following].name)
            self._reader.announce(dict.fromkeys(self.sources[full] for full in places))

    def _places(self, module: nn.Module, prefix: str, leave: Set[int] = frozenset()) -> Places:
        """Return the parameters and buffers below `module` that the checkpoint has, by full name."""
        places: Places = {}
        for path, child in module.named_modules(prefix=prefix, remove_duplicate=False):
            for name, tensor in (*child._parameters.items(), *child._buffers.items()):
                full = f"{path}.{name}" if path else name
                if tensor is not None and id(tensor) not in leave and full in self.sources:
                    places[full] = (child, name)
        return places

    def _fill(self, module: nn.Module, prefix: str, leave: Set[int] = frozenset()) -> None:
        """Load the parameters and buffers below `module` from the checkpoint."""
        places = self._places(module, prefix, leave)
        tensors = self._reader.read(dict.fromkeys(self.sources[full] for full in places))
        shared: dict[str, nn.Parameter] = {}
        for full, (child, name) in places.items():
            source = self.sources[full]
            value = tensors[source]
            check_shape(source, value.shape, getattr(child, name).shape)
            value = value.to(self.device, non_blocking=True)
            if value.is_floating_point():
                if not all_finite(value):
                    raise DataError(f"the weight {source} holds NaN or infinity: the model is damaged")
                value = value.to(self.dtype)
            if name in child._buffers:
                child._buffers[name] = value
            else:
                child._parameters[name] = shared.setdefault(source, nn.Parameter(value, requires_grad=False))
        for full, parameter in module.named_parameters(prefix=prefix):
            if parameter.is_meta and id(parameter) not in leave:
                raise CheckpointError(f"{self.checkpoint.folder} has no tensor for {full}: copy the folder again")
        for child in module.modules():
            for name, buffer in child._buffers.items():
                if buffer is not None and id(buffer) not in leave and not buffer.is_meta:
                    child._buffers[name] = buffer.to(self.device)


def reason_to_leave(child: str, shape: torch.Size) -> str | None:
    """Return the reason why the linear layer `child` of a block stays unchanged; None if it may be compressed.

    `child` is its name in the block, and `shape` that of its weight.
    """
    if any(part in ROUTERS for part in child.split(".")):
        return "it routes tokens to experts"
    if min(shape) < SMALLEST:
        return f"it has fewer than {SMALLEST} rows or columns"
    return None


@contextmanager
def _empty(modules: Iterable[nn.Module], device: torch.device) -> Iterator[set[int]]:
    """Give modules that nothing runs parameters without elements on `device`, where models look for their own device.

    Yields the identities of all their parameters and buffers.
    """
    children = [child for module in modules for child in module.modules()]
    before = [(child, dict(child._parameters)) for child in children]
    for child, parameters in before:
        for name, parameter in parameters.items():
            if parameter is not None:
                without = torch.empty(0, dtype=parameter.dtype, device=device)
                child._parameters[name] = nn.Parameter(without, requires_grad=False)
    try:
        yield {id(p) for child in children for p in (*child._parameters.values(), *child._buffers.values())}
    finally:
        for child, parameters in before:
            child._parameters.update(parameters)


def _round_inputs(rounding: Callable[[Tensor], Tensor], module: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
    return rounding(arguments[0])


def forget(module: nn.Module) -> None:
    """Drop the weights below `module`; tied weights stay tied. Buffers stay: they are small and may be computed."""
    empty: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                without = nn.Parameter(parameter.to("meta"), requires_grad=False)
                child._parameters[name] = empty.setdefault(id(parameter), without)
