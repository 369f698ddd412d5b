"""Record a backward pass block by block, so that it resumes in a later process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hesse.checkpoints.journal import Journal
from hesse.networks.network import Network
from hesse.passes.backward import BackwardPass, BackwardState
from hesse.passes.block_state import recall_states, record_states
from hesse.processes import ALONE, Processes


def record_backward(
    journal: Journal, name: str, walk: BackwardPass, content: dict[str, Any], files: Sequence[Path]
) -> None:
    """Record that the pass `name` has finished a block, with `content` and the `files` that belong to it."""
    reached = walk.state.reached
    journal.record(f"{name}-{reached}", content, files)
    record_states(journal, f"{name}-gradient-{reached}", walk.state.gradients, {"scale": walk.scale})
    journal.forget(f"{name}-gradient-{reached + 2}")


def recall_backward(
    journal: Journal, name: str, network: Network, processes: Processes = ALONE
) -> tuple[BackwardState | None, list[dict[str, Any]]]:
    """Return the state that the pass `name` reached in all processes, and the contents of its records in order.

    The state is None if no block is finished.
    """
    last = len(network.blocks)
    reached, contents = last, list[dict[str, Any]]()
    while reached and (content := journal.recall(f"{name}-{reached - 1}")) is not None:
        contents.append(content)
        reached -= 1
    numbers = range(reached, last)
    kept = {number: recall_states(journal, f"{name}-gradient-{number}", network.device) for number in numbers}
    reached = next((number for number in numbers if kept[number] is not None), last)
    reached = last - processes.all_reduce_min(last - reached)
    recalled = kept.get(reached)
    if not processes.all_reduce_min(recalled is not None) or recalled is None:
        return None, []
    return BackwardState(reached, recalled[1]["scale"], recalled[0]), contents[: last - reached]
