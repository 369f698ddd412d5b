"""Backpropagate the final loss through a streamed model: from the last block to the first, one in memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hesse.checkpoints.tensor_store import TensorStore
from hesse.curvature import CrossEntropy, Origin
from hesse.curvature.objective import label_generator
from hesse.errors import DataError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.networks.network import Block, Layer, Network, each_loaded
from hesse.passes.block_state import BlockState, Shared
from hesse.passes.parts import ParameterPart
from hesse.passes.recorded_batch import RecordedBatch, Recorder
from hesse.passes.stream import StreamBatch, finish
from hesse.processes import ALONE, Processes

ACTIVATIONS_HELD = 4  # copies of a block's activations that a backward pass holds: autograd's, and the gradients


@dataclass(frozen=True, eq=False)
class BackwardState:
    """State of a backward pass between two blocks, from which it can resume."""

    reached: int  # the gradients are at the input of this block; the number of blocks at the start
    scale: float  # the factor that turns sums over all flows into nats per token
    gradients: list[BlockState]  # of the summed loss, one per flow


class BackwardPass:
    """Backward pass that yields each block's recorded inputs and gradients for the true Fisher, last block first.

    `flows` have passed all blocks; `inputs[k]` are the inputs of block k, one state per flow. The loss is the summed
    cross-entropy of labels sampled from the model, the same for the same `seed`; for an encoder it is ½‖h - h₀‖² of the
    last hidden states, which are the nats of a unit-variance Gaussian. Memory: one block, and its activations for one
    flow; gradients and hidden states are kept in `shelf`, or in memory.

    Iteration yields each block, loaded, with the recorded batches of its flows, which must be consumed before the next
    block. Sums over all of them, times `scale`, are in nats per token, and equal those of an Objective on the whole
    model.
    `apart` refuses layers that mix the samples of a flow. `state` resumes an interrupted pass. Each of several
    `processes` has its own flows; `earlier` are the token ids that precede them in the data, so that scale and labels
    are the same as in one process.
    """

    origin = Origin("sampled Fisher", "position", "nats per token")

    def __init__(
        self,
        network: Network,
        flows: list[StreamBatch],
        inputs: list[list[BlockState]],
        seed: int,
        apart: bool = False,
        shelf: TensorStore | None = None,
        state: BackwardState | None = None,
        processes: Processes = ALONE,
        earlier: Iterable[Tensor] = (),
    ) -> None:
        self.network, self.flows, self.inputs, self.apart = network, flows, inputs, apart
        self._shelf, self.processes = TensorStore() if shelf is None else shelf, processes
        self.state = self._begin(seed, earlier) if state is None else state

    @property
    def scale(self) -> float:
        """Return the factor that turns sums over all flows into means over tokens."""
        return self.state.scale

    def _begin(self, seed: int, earlier: Iterable[Tensor]) -> BackwardState:
        """Compute the gradients at the output of the last block."""
        terms, generator, last = 0, label_generator(seed), len(self.network.blocks)
        gradients = []
        for ids in earlier:
            self._noise(ids, generator)
        with self.network.surroundings() as model:
            for flow in self.flows:
                hidden, shared = _leaves(flow.waiting)
                output = finish(self.network, model, flow, hidden, shared)
                loss, count = self._sampled_loss(output, flow.targets, generator)
                gradients.append(self._keep([loss], None, hidden, shared, [], last)[0])
                terms += count
        terms = self.processes.all_reduce_sum(terms)
        if not terms:
            raise DataError("no sample has a token that predicts another: give samples of 2 tokens or more")
        return BackwardState(last, 1 / terms, gradients)

    def __iter__(self) -> Iterator[tuple[Block, Iterator[RecordedBatch]]]:
        for index, block in each_loaded(self.network, reversed(range(self.state.reached))):
            passages = self._passages(block, index)
            yield block, passages
            for _ in passages:  # batches that were not consumed still propagate the gradient
                pass

    def _passages(self, block: Block, index: int) -> Iterator[RecordedBatch]:
        """Yield each flow's recorded batch; after the last one the gradients are at the block's input."""
        modules = {layer.name: layer.module for layer in block.layers}
        found: list[BlockState] = []
        copied: set[str] = set()  # layers whose outputs the block changes in place
        for flow, waiting, gradient in zip(self.flows, self.inputs[index], self.state.gradients, strict=True):
            hidden, shared = _leaves(waiting)
            (output, passed), recorder = _recorded(flow, hidden, shared, block, index, modules, copied)
            if recorder.changed:
                copied |= recorder.changed
                (output, passed), recorder = _recorded(flow, hidden, shared, block, index, modules, copied)
            ends, given = [output], [gradient.tensor()]
            for key, slope in gradient.shared_tensors().items():
                if passed[key].requires_grad:
                    ends, given = [*ends, passed[key]], [*given, slope]
            kept, slopes = self._keep(ends, given, hidden, shared, recorder.outputs, index)
            mixed = not recorder.leading(len(flow.ids), output.ndim)
            if mixed and self.apart and len(flow.ids) > 1:
                raise UnsupportedModelError(f"{block.name} mixes the samples of a batch: use batches of one sample")
            found.append(kept)
            yield RecordedBatch(recorder.rows(slopes, flat=mixed), len(flow.ids))
        self.state = BackwardState(index, self.scale, found)

    def _keep(
        self,
        ends: list[Tensor],
        slopes: list[Tensor] | None,
        hidden: Tensor,
        shared: Shared,
        outputs: list[Tensor],
        index: int,
    ) -> tuple[BlockState, Sequence[Tensor | None]]:
        """Keep the gradients at the input of block `index`; return them, and those at the `outputs` of its layers.

        `slopes` are the gradients at `ends`.
        """
        leaves = {key: value for key, value in shared.items() if value.requires_grad}
        back, *others = torch.autograd.grad(ends, [hidden, *leaves.values(), *outputs], slopes, allow_unused=True)
        beside = dict(zip(leaves, others, strict=False))
        kept = {key: slope for key, slope in beside.items() if slope is not None}
        return BlockState.keep(self._shelf, index, back, kept), others[len(leaves) :]

    def _sampled_loss(self, output: Tensor, targets: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int]:
        """Return the summed loss of labels sampled from the model, and the number of tokens in the sum."""
        output = output.float()
        if not all_finite(output):
            raise DataError(
                f"the output of {type(self.network.model).__name__} holds NaN or infinity: its last norm or its head "
                "overflows on this data"
            )
        if self.network.kind == "encoder":
            noise = self._noise(targets, generator)
            return (output * noise.to(output.device)).sum(), output.shape[0] * output.shape[1]
        loss = CrossEntropy()
        labels = loss.sample_targets(output, targets, generator)
        return loss.terms(output, labels).sum(), loss.count(labels) or 0

    def _noise(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the random numbers for the labels of `ids`, per sample, so that they do not depend on the batches."""
        if self.network.kind == "encoder":
            width = self.network.model.config.get_text_config().hidden_size
            return torch.stack([torch.randn(len(sample), width, generator=generator) for sample in ids])
        return torch.rand(ids.shape, dtype=torch.float64, generator=generator)


def _leaves(state: BlockState) -> tuple[Tensor, Shared]:
    """Return hidden states and the tensors beside them, as leaves of a new graph."""
    shared = {key: value.detach() for key, value in state.shared_tensors().items()}
    for value in shared.values():
        if value.is_floating_point():
            value.requires_grad_()
    return state.tensor().detach().requires_grad_(), shared


def _recorded(
    flow: StreamBatch,
    hidden: Tensor,
    shared: Shared,
    block: Block,
    index: int,
    modules: dict[str, nn.Module],
    copied: set[str],
) -> tuple[tuple[Tensor, Shared], Recorder]:
    with torch.enable_grad(), Recorder(modules, copied) as recorder:
        return flow.run(block.module, index, hidden.clone(), shared), recorder  # which blocks may change in place


def layer_part(layer: Layer) -> ParameterPart:
    """Return a streamed layer's weight as a part."""
    return ParameterPart(f"{layer.name}.weight", "matrix", (layer.name,), isinstance(layer.module, Conv1D))
