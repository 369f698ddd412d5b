"""The gradient of the end loss through a streamed model: from the last block back to the first, one in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hesse.checkpoints.tensor_store import StoredTensor, TensorStore
from hesse.curvature import CrossEntropy, Origin
from hesse.curvature.losses import next_tokens
from hesse.curvature.objective import label_generator
from hesse.errors import DataError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.networks.network import Block, Layer, Network
from hesse.passes.parts import Part
from hesse.passes.recorded_batch import RecordedBatch, Recorder
from hesse.passes.stream import StreamBatch, finish
from hesse.processes import ALONE, Processes


@dataclass(frozen=True, eq=False)
class BackwardState:
    """How far a walk back has come: what it takes to go on from there."""

    reached: int  # the block that the gradients are at the input of; the number of blocks at the start
    scale: float  # what makes sums over all flows nats per token
    gradients: list[StoredTensor]  # of the summed loss, one a flow


class BackwardPass:
    """What each block's linear layers see of the true Fisher, blocks from the last to the first.

    `flows` have passed all blocks; `inputs[k]` are the hidden states that reached block k, one tensor a flow. The loss
    is the summed cross-entropy of labels sampled from the model, the same for the same `seed`; an encoder's is
    ½‖h - h₀‖² of its last hidden states, so a unit-variance Gaussian's nats. Memory: one block, and its activations for
    one flow; the gradients wait on `shelf`, as the hidden states do, or in memory.

    Iterating gives each block, loaded, with the passages of its flows, which are to be used up before the next. Sums
    over all of them, times `scale`, are nats per token: equal to those of an Objective on the whole model.
    `apart` refuses layers that mix the samples of a flow. A walk goes on from the `state` of one that was cut short.
    Of several `processes` each walks with flows of its own, `earlier` being the token ids of those before them in the
    data: the scale and the labels are as if one process had them all.
    """

    origin = Origin("sampled Fisher", "position", "nats per token")

    def __init__(
        self,
        network: Network,
        flows: list[StreamBatch],
        inputs: list[list[StoredTensor]],
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
        """What sums over all flows are multiplied by, to be means over tokens."""
        return self.state.scale

    def _begin(self, seed: int, earlier: Iterable[Tensor]) -> BackwardState:
        """The gradients behind the last block."""
        terms, generator, last = 0, label_generator(seed), len(self.network.blocks)
        gradients = []
        for ids in earlier:
            self._noise(ids, generator)
        with self.network.surroundings() as model:
            for flow in self.flows:
                hidden = flow.hidden.detach().requires_grad_()
                loss, count = self._sampled_loss(finish(self.network, model, flow, hidden), flow.ids, generator)
                (gradient,) = torch.autograd.grad(loss, hidden)
                gradients.append(self._shelf.keep(gradient, last))
                terms += count
        terms = self.processes.all_reduce_sum(terms)
        if not terms:
            raise DataError("no sample has a token that predicts another: give samples of 2 tokens or more")
        return BackwardState(last, 1 / terms, gradients)

    def __iter__(self) -> Iterator[tuple[Block, Iterator[RecordedBatch]]]:
        for index in reversed(range(self.state.reached)):
            block = self.network.blocks[index]
            with self.network.loaded(block):
                passages = self._passages(block, index)
                yield block, passages
                for _ in passages:  # what was not looked at still carries the gradient back
                    pass

    def _passages(self, block: Block, index: int) -> Iterator[RecordedBatch]:
        """What each flow shows of a block; once all are looked at, the walk has reached the block's input."""
        modules = {layer.name: layer.module for layer in block.layers}
        found: list[StoredTensor] = []
        copied: set[str] = set()  # layers whose outputs the block changes in place
        for flow, waiting, gradient in zip(self.flows, self.inputs[index], self.state.gradients, strict=True):
            hidden = waiting.tensor().detach().requires_grad_()
            output, recorder = _recorded(flow, hidden, block, index, modules, copied)
            if recorder.changed:
                copied |= recorder.changed
                output, recorder = _recorded(flow, hidden, block, index, modules, copied)
            wanted = [hidden, *recorder.outputs]
            back, *slopes = torch.autograd.grad(output, wanted, gradient.tensor(), allow_unused=True)
            mixed = not recorder.leading(len(flow.ids), output.ndim)
            if mixed and self.apart and len(flow.ids) > 1:
                raise UnsupportedModelError(f"{block.name} mixes the samples of a batch: take one sample a batch")
            found.append(self._shelf.keep(back, index))
            yield RecordedBatch(recorder.rows(slopes, flat=mixed), len(flow.ids))
        self.state = BackwardState(index, self.scale, found)

    def _sampled_loss(self, output: Tensor, ids: Tensor, generator: torch.Generator | None) -> tuple[Tensor, int]:
        """The summed loss of labels drawn from the model itself, and the number of tokens it is summed over."""
        output = output.float()
        if not all_finite(output):
            raise DataError(
                f"the output of {type(self.network.model).__name__} holds NaN or infinity: its last norm or its head "
                "overflows on this data"
            )
        if self.network.kind == "encoder":
            noise = self._noise(ids, generator)
            return (output * noise.to(output.device)).sum(), output.shape[0] * output.shape[1]
        loss = CrossEntropy()
        labels = loss.sample_targets(output, next_tokens(ids), generator)
        return loss.terms(output, labels).sum(), loss.count(labels) or 0

    def _noise(self, ids: Tensor, generator: torch.Generator | None) -> Tensor:
        """The random numbers that the labels of `ids` are made of, sample by sample, however samples are batched."""
        if self.network.kind == "encoder":
            width = self.network.model.config.get_text_config().hidden_size
            return torch.stack([torch.randn(len(sample), width, generator=generator) for sample in ids])
        return torch.rand(ids.shape, dtype=torch.float64, generator=generator)


def _recorded(
    flow: StreamBatch, hidden: Tensor, block: Block, index: int, modules: dict[str, nn.Module], copied: set[str]
) -> tuple[Tensor, Recorder]:
    with torch.enable_grad(), Recorder(modules, copied) as recorder:
        return flow.through(block.module, index, hidden), recorder


def layer_part(layer: Layer) -> Part:
    """A streamed layer's weight as a part."""
    return Part(f"{layer.name}.weight", "matrix", (layer.name,), isinstance(layer.module, Conv1D))
