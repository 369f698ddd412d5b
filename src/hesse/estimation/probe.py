"""Passes through the unchanged model: backward statistics, and the check samples' hidden states."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from hesse.checkpoints.journal import Journal, describe_tensors
from hesse.checkpoints.tensor_store import StoredTensor, TensorStore
from hesse.data import Samples
from hesse.estimation.backward_records import recall_backward, record_backward
from hesse.estimation.calibrated import StatisticReaders
from hesse.estimation.statistics import BackwardCollection, Needs, needs_samples
from hesse.networks.network import Network, each_loaded
from hesse.passes.backward import BackwardPass
from hesse.passes.block_state import BlockState, recall_states, record_states
from hesse.passes.stream import StreamBatch, advance, calibration_batch, evaluation_batch, start, take_up
from hesse.processes import ALONE, Processes
from hesse.progress import Clock

NAME = "statistics"  # of the backward pass in the journal


def check_pass(
    network: Network, check: list[Tensor], clock: Clock, step: Callable[[], None], journal: Journal | None = None
) -> list[StreamBatch]:
    """Pass the batches `check` (samples, tokens) through all blocks of the unchanged model; `step` after each block."""
    if not check:
        return []
    with clock.phase("probe"):
        flows = start(network, check, None if journal is None else TensorStore(journal.folder, "check", lasting=True))
    forward_walk(network, flows, [], clock, step, journal)
    return flows


def probe(
    network: Network,
    samples: Samples,
    needs: Needs,
    folder: Path | None,
    seed: int,
    clock: Clock,
    step: Callable[[], None],
    journal: Journal | None = None,
    processes: Processes = ALONE,
) -> dict[str, StatisticReaders]:
    """Collect the backward statistics that layers need, in nats per token; `step` after each block.

    The samples pass through the unchanged model forward and backward. The statistics are kept below `folder`, and,
    during the pass, the inputs of each block; without a folder all are in memory. With a `journal`, which must be of
    that folder, an interrupted pass resumes. Each of several `processes` has its shard of the samples and its own
    folder, and gets the sums over all processes.

    Returns:
        What reads a statistic, by layer and name.
    """
    of_samples = needs_samples(needs)
    size = min(evaluation_batch(network, samples.longest), calibration_batch(samples.longest))
    size = min(size, max(len(samples.ids) // processes.world_size, 1))
    size = 1 if of_samples else size  # because experts mix the samples of a batch
    lasting = journal is not None
    earlier, batches = processes.shard(samples.batches(size))
    with clock.phase("probe"):
        flows = start(network, batches, TensorStore(folder, "probe", lasting))
    inputs = forward_walk(network, flows, flows, clock, step, journal)
    known: dict[str, StatisticReaders] = {}
    store, state = TensorStore(folder, "statistic", lasting), None
    with clock.phase("probe"):
        if journal is not None:
            state, records = recall_backward(journal, NAME, network, processes)
            for record in records:
                _add(known, record["names"], journal.find_tensors(record, network.device))
        shelf = TensorStore(folder, f"{NAME}-gradient", lasting)
        walk = BackwardPass(network, flows, inputs, seed, of_samples, shelf, state, processes, earlier)
        for _ in range(1 + len(network.blocks) - walk.state.reached):
            step()
        for values in backward_statistics(walk, needs):
            kept = [store.keep(value, walk.state.reached) for own in values.values() for value in own.values()]
            names = [(layer, name) for layer, own in values.items() for name in own]
            _add(known, names, kept)
            if journal is not None:
                described, paths = describe_tensors(kept)
                record_backward(journal, NAME, walk, {"names": names, **described}, paths)
            step()
    return known


def _add(known: dict[str, StatisticReaders], names: Iterable[tuple[str, str]], tensors: list[StoredTensor]) -> None:
    for (layer, name), tensor in zip(names, tensors, strict=True):
        known.setdefault(layer, {})[name] = tensor.tensor


def forward_walk(
    network: Network,
    flows: list[StreamBatch],
    kept: list[StreamBatch],
    clock: Clock,
    step: Callable[[], None],
    journal: Journal | None = None,
) -> list[list[BlockState]]:
    """Pass `flows` through all blocks; return the inputs of each block for the flows in `kept`.

    With a `journal` they continue after the last block that they passed before.
    """
    name, inputs = flows[0].shelf.name, []
    passed = {} if journal is None else _passed(journal, name, network, every=bool(kept))
    first = max(passed, default=0)
    for index in range(first):
        inputs.append([flow.waiting for flow in kept])
        if index + 1 in passed:
            take_up(flows, passed[index + 1], index + 1)
        step()
    with clock.phase("read"):
        for index, block in each_loaded(network, range(first, len(network.blocks))):
            inputs.append([flow.waiting for flow in kept])
            with clock.phase("probe"):
                advance(flows, block.module, index, block.name)
            if journal is not None:
                record_states(journal, f"{name}-{index + 1}", [flow.waiting for flow in flows], {})
                if not kept:
                    journal.forget(f"{name}-{index - 1}")
            step()
    return inputs


def _passed(journal: Journal, name: str, network: Network, every: bool) -> dict[int, list[BlockState]]:
    """Return the flows' recorded states by number of passed blocks, after `every` block or the last one only."""
    found: dict[int, list[BlockState]] = {}
    numbers = range(1, len(network.blocks) + 1)
    for number in numbers if every else reversed(numbers):
        recalled = recall_states(journal, f"{name}-{number}", network.device)
        if recalled is not None:
            found[number] = recalled[0]
        if (recalled is None) == every:
            break
    return found


def backward_statistics(walk: BackwardPass, needs: Needs) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Yield for each block, from the last to the first, the backward statistics of its layers, by layer and name."""
    for block, recorded in walk:
        collection = BackwardCollection(block.layers, needs)
        for each in recorded:
            collection.add(each)
        yield collection.values(walk.scale, walk.processes)
