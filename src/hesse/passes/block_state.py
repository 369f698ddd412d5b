"""State of samples between two blocks: hidden states, and the tensors next to them that blocks pass on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesse.checkpoints.journal import Journal
from hesse.checkpoints.tensor_store import StoredTensor, TensorStore

StateKey = tuple[str | int, ...]  # an argument of the blocks, and the place in it; or ("returned", block, element)
Shared = dict[StateKey, Tensor]  # keys and values, top-k indices, ... that later blocks read


@dataclass(frozen=True, eq=False)
class BlockState:
    """Stored state of one batch between two blocks."""

    hidden: StoredTensor
    shared: dict[StateKey, StoredTensor] = field(default_factory=dict)

    @classmethod
    def keep(cls, store: TensorStore, step: int, hidden: Tensor, shared: Shared) -> "BlockState":
        """Store a batch's tensors as those of step `step`."""
        return cls(store.keep(hidden, step), {key: store.keep(tensor, step) for key, tensor in shared.items()})

    def tensor(self) -> Tensor:
        """Return the hidden states."""
        return self.hidden.tensor()

    def shared_tensors(self) -> Shared:
        """Return the tensors next to the hidden states."""
        return {key: stored.tensor() for key, stored in self.shared.items()}

    @property
    def tensors(self) -> list[StoredTensor]:
        """Return all tensors in the order in which they were stored."""
        return [self.hidden, *self.shared.values()]


def record_states(journal: Journal, step: str, states: Sequence[BlockState], content: dict[str, Any]) -> None:
    """Record a step with the states of all batches, whose tensors lie in one lasting file."""
    keys = [[list(key) for key in state.shared] for state in states]
    journal.record_tensors(step, [tensor for state in states for tensor in state.tensors], {**content, "shared": keys})


def recall_states(journal: Journal, step: str, device: torch.device) -> tuple[list[BlockState], dict[str, Any]] | None:
    """Return the states and the record of a finished step; None if it is not finished."""
    recalled = journal.recall_tensors(step, device)
    if recalled is None:
        return None
    tensors, content = iter(recalled[0]), recalled[1]
    states = []
    for keys in content["shared"]:
        hidden = next(tensors)
        states.append(BlockState(hidden, {tuple(key): next(tensors) for key in keys}))
    return states, content
