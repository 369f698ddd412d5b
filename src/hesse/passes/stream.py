"""Stream calibration data through a network, block after block."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hesse.checkpoints.tensor_store import TensorStore
from hesse.curvature.losses import input_ids, next_tokens, scored_tokens
from hesse.errors import DataError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.networks.layout import vocabulary
from hesse.networks.network import Network
from hesse.networks.towers import without_cache
from hesse.passes.block_calls import (
    ENCODED,
    BlockCall,
    CallRecorder,
    Calls,
    Constants,
    Returned,
    model_inputs,
    output_forms,
    replaced,
    run_base,
    run_block,
)
from hesse.passes.block_state import BlockState, Shared
from hesse.passes.joint_state import JointState

LOGITS_LIMIT = 1 << 25  # of a batch that is evaluated
BATCH_TOKENS = 2048  # small enough for the caches of a CPU, large enough for efficient products


class CalibrationBatch(Protocol):
    """One batch of samples that calibration passes through a network's blocks."""

    def pass_block(self, module: nn.Module, index: int) -> None:
        """Run block number `index`, which is `module`, on the hidden states; keep its output for the next block."""

    def arguments(self, index: int) -> Any:
        """Return the other arguments of block number `index`, whose tensors several batches may share."""


@dataclass(eq=False)
class StreamBatch:
    """One batch of samples between two blocks: token ids, hidden states, and the other arguments of each block."""

    given: Tensor  # (samples, tokens): token ids as `start` takes them
    targets: Tensor  # (samples, tokens): the token that each position predicts, or -100 where none is scored
    waiting: BlockState  # the hidden states, and what blocks share beside them
    calls: Calls  # of each block
    shelf: TensorStore  # where the state waits between two blocks
    step: int = 0  # number of blocks passed
    joint: JointState | None = None  # of the hidden states inside a decoder that has an encoder

    @property
    def ids(self) -> Tensor:
        """Return the token ids (samples, tokens) as the model reads them."""
        return input_ids(self.given)

    @property
    def hidden(self) -> Tensor:
        """Return the hidden states (samples, tokens, width) from the store; inside such a decoder the joint state."""
        return self.waiting.tensor()

    def pass_block(self, module: nn.Module, index: int) -> None:
        """Run block number `index`, which is `module`, on the hidden states, and keep its output for the next."""
        self.keep(*self.run(module, index))

    def keep(self, hidden: Tensor, shared: Shared) -> None:
        """Keep the output of a block for the next one."""
        self.step += 1
        self.waiting = BlockState.keep(self.shelf, self.step, hidden, shared)

    def arguments(self, index: int) -> Any:
        """Return the other arguments of block number `index`."""
        return self.calls[index]

    def run(
        self, module: nn.Module, index: int, hidden: Tensor | None = None, shared: Shared | None = None
    ) -> tuple[Tensor, Shared]:
        """Return the output (samples, tokens, width) of block `index`, which is `module`, and what blocks share then.

        `hidden` and `shared` replace the waiting ones.
        """
        hidden = self.hidden if hidden is None else hidden
        shared = self.waiting.shared_tensors() if shared is None else shared
        if self.joint is None or index <= self.joint.entry:
            return run_block(module, index, self.calls, hidden, shared)
        own, encoded = self.joint.split(hidden)
        output, shared = run_block(module, index, self.calls, own, shared, {ENCODED: encoded})
        return self.joint.join(output, encoded), shared


def calibration_batch(length: int) -> int:
    """Return the number of samples of `length` tokens per batch."""
    return max(BATCH_TOKENS // length, 1)


def evaluation_batch(network: Network, length: int) -> int:
    """Return the number of samples of `length` tokens whose logits stay within `LOGITS_LIMIT`."""
    return max(LOGITS_LIMIT // (vocabulary(network.model) * length), 1)


def start(network: Network, batches: Iterable[Tensor], shelf: TensorStore | None = None) -> list[StreamBatch]:
    """Compute the first block's input for each batch of token ids (samples, tokens), and the blocks' other arguments.

    Tokens that `hide_from_loss` hid pass like others, but are no targets. Hidden states are kept in `shelf`, or in
    memory.
    """
    flows: list[StreamBatch] = []
    shelf = TensorStore() if shelf is None else shelf
    constants: Constants = {}
    with network.surroundings() as model, torch.no_grad():
        for ids in batches:
            flow = _record(network, model, ids.to(network.device), shelf, constants)
            if flows:
                flow.calls = [_reuse(new, old) for new, old in zip(flow.calls, flows[-1].calls, strict=True)]
            flows.append(flow)
    return flows


def finish(
    network: Network, model: nn.Module, flow: StreamBatch, hidden: Tensor | None = None, shared: Shared | None = None
) -> Tensor:
    """Compute the model's output from a flow's state, or `hidden` and `shared`, after all blocks, by its own forward.

    The output is logits (samples, tokens, vocabulary), or an encoder's last hidden states (samples, tokens, width).
    `model` is the model yielded by `network.surroundings()`.
    """
    passed = flow.hidden if hidden is None else hidden
    if flow.joint is not None:
        passed, _ = flow.joint.split(passed)
    shared = flow.waiting.shared_tensors() if shared is None else shared
    last = max(index for index, call in enumerate(flow.calls) if call is not None)
    assert network.output_forms is not None

    def inject(index: int, hidden: Tensor, call: BlockCall, rest: list[Tensor | None]) -> Tensor:
        if index < last:
            return hidden
        rest[:] = [shared.get(Returned(last, number).key, value) for number, value in enumerate(rest)]
        return passed

    inputs = model_inputs(network, model, flow.ids)
    with replaced(network, network.output_forms, inject), without_cache(model):
        if network.kind == "encoder":
            result = getattr(model.base_model(**inputs), "last_hidden_state", None)  # type: ignore[operator]
        else:
            result = model(**inputs, use_cache=False).logits
    if not isinstance(result, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns neither logits nor last hidden states: give hesse.compress the module "
            "from Python, with a loss_function"
        )
    return result


def advance(flows: Iterable[StreamBatch], module: nn.Module, index: int, block: str | None = None) -> None:
    """Pass all flows through block number `index`; with its name `block`, check that the output is finite.

    Raises:
        DataError: the output holds NaN or infinity.
    """
    with torch.no_grad():
        for flow in flows:
            hidden, shared = flow.run(module, index)
            if block is not None and not all_finite(hidden):
                raise DataError(
                    f"the output of {block} holds NaN or infinity: the model overflows on this data, or its weights "
                    "are damaged"
                )
            flow.keep(hidden, shared)


def take_up(flows: Iterable[StreamBatch], waiting: Iterable[BlockState], step: int) -> None:
    """Restore flows to their state after `step` blocks, which is `waiting`."""
    for flow, state in zip(flows, waiting, strict=True):
        flow.waiting, flow.step = state, step


def _record(network: Network, model: nn.Module, given: Tensor, shelf: TensorStore, constants: Constants) -> StreamBatch:
    """Run the model with blocks that return their input, and record the arguments of each block."""
    # A decoder that has an encoder predicts the ids themselves.
    targets = scored_tokens(given) if network.kind == "seq2seq-lm" else next_tokens(given)
    ids = input_ids(given)
    if network.output_forms is None:
        network.output_forms = output_forms(network, model, ids[:1])
    recorder = CallRecorder(network, constants, ids.shape)
    with replaced(network, network.output_forms, recorder.note):
        run_base(network, model, ids)
    if not recorder.first:
        raise UnsupportedModelError(f"{type(network.model).__name__} does not call its blocks for token ids")
    state = BlockState.keep(shelf, 0, next(iter(recorder.first.values())), {})
    flow = StreamBatch(given, targets, state, recorder.calls, shelf)
    entry = network.decoder_entry
    if entry is not None:
        flow.joint = JointState(entry, recorder.first[entry + 1].shape, recorder.encoded)
        flow.calls[entry] = {"enter": partial(_enter_decoder, network, ids, flow.joint)}
    return flow


def _enter_decoder(network: Network, ids: Tensor, joint: JointState, hidden: Tensor) -> Tensor:
    """Return the joint state before a decoder's blocks from the hidden states behind the encoder's, by the model."""
    found: list[Tensor] = []
    assert network.output_forms is not None

    def pass_by(index: int, state: Tensor, call: BlockCall, rest: list[Tensor | None]) -> Tensor:
        if index == joint.entry + 1:
            found[:] = [state, call[ENCODED]]
        return hidden if index == 0 else state

    with replaced(network, network.output_forms, pass_by):
        run_base(network, network.model, ids)
    decoder, encoder = found
    return joint.join(decoder, encoder)


def _reuse(new: BlockCall | None, old: BlockCall | None) -> BlockCall | None:
    """Return `new` with equal values replaced by those of `old`, so that masks and rotations are stored once."""
    if new is None or old is None:
        return new
    return {key: old[key] if key in old and _equal(value, old[key]) else value for key, value in new.items()}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a is b
