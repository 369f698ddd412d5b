"""Batches of a data set, pass after pass, with random numbers that depend only on a seed and the batch's number."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from hesse.curvature import Objective
from hesse.curvature.objective import Batch

FETCH, USE = 0, 1  # uses of a batch's random numbers


@dataclass
class Passes:
    """Repeated passes over the objective's data.

    Each batch is fetched under its own seed, so that shuffling and augmentation by torch's random numbers are the same
    in a run that was interrupted and resumed. The data's own generator (a DataLoader's) is reset to its state at the
    start of the pass.
    """

    objective: Objective
    seed: int
    number: int = 0  # of batches in all passes
    position: int = 0  # of batches in this pass
    began: torch.Tensor | None = None  # the state of the data's own generator
    _batches: Iterator[Batch] | None = field(default=None, repr=False)

    def fetch(self) -> Batch:
        """Return the next batch, on the model's device.

        Raises:
            DataError: there is no data.
        """
        while True:
            if self._batches is None:
                self._batches, self.position = self.objective.batches(), 0
                self.began = None if self._generator is None else self._generator.get_state()
            seed_all(self.seed, self.number, FETCH)
            batch = next(self._batches, None)
            if batch is not None:
                self.number, self.position = self.number + 1, self.position + 1
                return batch
            self._batches = None

    def first(self, number: int) -> list[Batch]:
        """Return the first batches of another pass, and restore the data's own generator."""
        before = None if self._generator is None else self._generator.get_state()
        seed_all(self.seed, self.number, FETCH)
        found = list(islice(self.objective.batches(), number))
        if self._generator is not None and before is not None:
            self._generator.set_state(before)
        return found

    def state(self) -> dict[str, Any]:
        """Return the position in the data."""
        return {"number": self.number, "position": self.position, "began": self.began}

    def go_to(self, state: dict[str, Any]) -> None:
        """Restore a position in the data."""
        if self._generator is not None and state["began"] is not None:
            self._generator.set_state(state["began"])
        self.number, self._batches = state["number"] - state["position"], None
        for _ in range(state["position"]):
            self.fetch()

    @property
    def _generator(self) -> torch.Generator | None:
        found = getattr(self.objective.data, "generator", None)
        return found if isinstance(found, torch.Generator) else None


def seed_all(seed: int, number: int, use: int) -> None:
    """Seed torch's random numbers for one use of one batch."""
    torch.manual_seed((seed * 1_000_003 + 2 * number + use) % (1 << 63))
