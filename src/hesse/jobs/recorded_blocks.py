"""Record one block after another, so that a killed run resumes behind the last one."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hesse.jobs.job import Job
from hesse.networks.network import CheckpointNetwork
from hesse.passes.stream import StreamBatch


class BlockRecord(NamedTuple):
    """Record of a finished block: values in JSON, the result's tensors, and files in the journal's folder."""

    content: dict[str, Any]
    tensors: dict[str, Tensor] | None = None
    files: Sequence[Path] = ()


def record_blocks(
    job: Job,
    network: CheckpointNetwork,
    flows: list[StreamBatch],
    finish: Callable[[Sequence[dict[str, Any]]], Iterator[BlockRecord]],
) -> list[dict[str, Any]]:
    """Record each block of `network` as it is finished; return the contents of all records in order.

    `finish` gets these contents, at first those of an earlier process, and yields the records of the blocks that
    follow. The `flows`, if there are any, have passed a block when its record is yielded.
    """
    steps = job.steps("block", network, flows)
    contents = list(steps.done)
    for _ in contents:
        job.progress.advance()
    for index, record in enumerate(finish(contents), len(contents)):
        steps.note(index, *record)
        contents.append(record.content)
        job.progress.advance()
    return contents
