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
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True for rank 0, which does what is done once."""
        return self.rank == 0

    def writer(self, number: int) -> int:
        """Return the rank that writes file number `number`."""
        return number % self.world_size

    def shard_of(self, number: int) -> range:
        """Return the range of this rank among `number` items in a row; sizes differ by at most one."""
        return range(self.rank * number // self.world_size, (self.rank + 1) * number // self.world_size)

    def shard(self, batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the batches before this rank's shard, and the shard.

        Raises:
            OptionError: there are more processes than batches.
        """
        if len(batches) < self.world_size:
            raise OptionError(
                f"{self.world_size} processes cannot share {len(batches)} batches of samples: start fewer, or give "
                "more samples"
            )
        share = self.shard_of(len(batches))
        return batches[: share.start], batches[share.start : share.stop]

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place.

        Raises:
            ProcessError: another process has ended.
        """
        if self.world_size > 1:
            with _together():
                distributed.all_reduce(tensor)

    def all_reduce_sum(self, number: int) -> int:
        """Return the sum of a number over all ranks."""
        return self._reduced(number, distributed.ReduceOp.SUM)

    def all_reduce_min(self, number: int) -> int:
        """Return the minimum of a number over all ranks."""
        return self._reduced(number, distributed.ReduceOp.MIN)

    def all_gather(self, own: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along their first dimension, the only one that may differ."""
        if self.world_size == 1:
            return own
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(own)
        self.all_reduce(lengths)
        parts = [own.new_empty((int(length), *own.shape[1:])) for length in lengths]
        parts[self.rank].copy_(own)
        return torch.cat([self.broadcast(part, rank) for rank, part in enumerate(parts)])

    def broadcast(self, tensor: Tensor, rank: int = 0) -> Tensor:
        """Return the tensor of rank `rank` in every rank; its shape is the same in all."""
        if self.world_size > 1:
            tensor = tensor.contiguous()
            with _together():
                # Collectives know no booleans, and of some types not all backends know.
                distributed.broadcast(tensor.view(torch.uint8) if tensor.ndim else tensor, rank)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank has arrived."""
        if self.world_size > 1:
            with _together():
                distributed.barrier()

    def _reduced(self, number: int, operation: Any) -> int:
        if self.world_size == 1:
            return number
        tensor = torch.tensor([number], dtype=torch.int64)
        with _together():
            distributed.all_reduce(tensor, operation)
        return int(tensor)


ALONE = Processes()


def is_main_process() -> bool:
    """Return True for rank 0 or without torchrun, before the process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def join_process_group(device: torch.device) -> Processes:
    """Join the process group that torchrun started; without torchrun, return a group of one.

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
