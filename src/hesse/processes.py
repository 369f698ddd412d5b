"""Several processes on one job, as torchrun starts them; without it, one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from hesse.errors import HesseError, OptionError

PATIENCE = timedelta(hours=12)  # how long one process may be busy with what the others wait for


class ProcessError(HesseError):
    """Another process of the same job ended before it should."""


@dataclass(frozen=True)
class Processes:
    """This process and the others of its job. Every process makes the same calls in the same order."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def writer(self, number: int) -> int:
        """Which process writes file number `number`."""
        return number % self.count

    def share(self, number: int) -> range:
        """Which of `number` things in a row are this process's; sizes differ by at most one."""
        return range(self.rank * number // self.count, (self.rank + 1) * number // self.count)

    def portion(self, batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Batches before this process's share of them, and the share.

        Raises:
            OptionError: there are more processes than batches.
        """
        if len(batches) < self.count:
            raise OptionError(
                f"{self.count} processes cannot share {len(batches)} batches of samples: start fewer, or give more "
                "samples"
            )
        share = self.share(len(batches))
        return batches[: share.start], batches[share.start : share.stop]

    def add(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place in each.

        Raises:
            ProcessError: another process has ended.
        """
        if self.count > 1:
            with _together():
                distributed.all_reduce(tensor)

    def total(self, number: int) -> int:
        """The sum of a number over all processes."""
        return self._reduced(number, distributed.ReduceOp.SUM)

    def least(self, number: int) -> int:
        """The least of a number over all processes."""
        return self._reduced(number, distributed.ReduceOp.MIN)

    def joined(self, own: Tensor) -> Tensor:
        """The tensors of all processes one after another, along their first dimension, the only one that may differ."""
        if self.count == 1:
            return own
        lengths = torch.zeros(self.count, dtype=torch.int64)
        lengths[self.rank] = len(own)
        self.add(lengths)
        parts = [own.new_empty((int(length), *own.shape[1:])) for length in lengths]
        parts[self.rank].copy_(own)
        return torch.cat([self.first(part, rank) for rank, part in enumerate(parts)])

    def first(self, tensor: Tensor, rank: int = 0) -> Tensor:
        """The tensor of the first process, or of process number `rank`, in all; it has the same shape in all."""
        if self.count > 1:
            tensor = tensor.contiguous()
            with _together():
                # Collectives know no booleans, and of some types not all backends know.
                distributed.broadcast(tensor.view(torch.uint8) if tensor.ndim else tensor, rank)
        return tensor

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            with _together():
                distributed.barrier()

    def _reduced(self, number: int, operation: Any) -> int:
        if self.count == 1:
            return number
        tensor = torch.tensor([number], dtype=torch.int64)
        with _together():
            distributed.all_reduce(tensor, operation)
        return int(tensor)


ALONE = Processes()


def is_first() -> bool:
    """Whether this process is the first of those that torchrun started, or the only one; before they are joined."""
    return int(os.environ.get("RANK", "0")) == 0


def joined(device: torch.device) -> Processes:
    """All processes that torchrun started; this one alone, if it did not.

    Raises:
        ProcessError: the others cannot be reached.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with _together():
            distributed.init_process_group(backend, timeout=PATIENCE)
    return Processes(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ProcessError(f"another process of this run has ended, so this one stops too ({reason})") from None
