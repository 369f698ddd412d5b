"""The dense model's own pass: what its layers' outputs mean to the loss, and what it predicts on the check samples."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hesse.checkpoints.journal import Journal
from hesse.checkpoints.tensor_store import StoredTensor, TensorStore
from hesse.data import Samples
from hesse.estimation.factor_store import StoredFactors
from hesse.estimation.loss_factors import LossFactors
from hesse.estimation.weight_fisher import NOTHING, FisherNeeds
from hesse.networks.network import Network
from hesse.passes.backward import BackwardPass, BackwardState
from hesse.passes.batch_sizes import evaluation_batch
from hesse.passes.stream import StreamBatch, advance, calibration_batch, start, take_up
from hesse.processes import ALONE, Processes
from hesse.progress import Clock


@dataclass(frozen=True, eq=False)
class DensePass:
    """What the loss feels of each layer's outputs, and the check samples' flows after the last block.

    `sensitivities` are E[ggᵀ] (out, out) at the outputs of layers whose whole factor was asked for, and E[g²] (out,) of
    the others, in nats per token.
    """

    sensitivities: Mapping[str, Tensor]
    flows: list[StreamBatch]


def check_pass(
    network: Network, check: list[Tensor], clock: Clock, step: Callable[[], None], journal: Journal | None = None
) -> list[StreamBatch]:
    """The batches `check` (samples, tokens) after all blocks of the unchanged model; `step` after each block."""
    if not check:
        return []
    with clock.phase("probe"):
        flows = start(network, check, None if journal is None else TensorStore(journal.folder, "check", lasting=True))
    forward_walk(network, flows, [], clock, step, journal)
    return flows


def probe(
    network: Network,
    samples: Samples,
    whole: Collection[str],
    folder: Path,
    seed: int,
    clock: Clock,
    step: Callable[[], None],
    journal: Journal | None = None,
    processes: Processes = ALONE,
    fisher: FisherNeeds = NOTHING,
) -> StoredFactors:
    """E[ggᵀ] (out, out) at the outputs of the layers `whole`, E[g²] (out,) at those of others; `step` after each block.

    By the weights' names the Fisher on them as `fisher` says.

    The samples go through the unchanged model and back; what is found is kept below `folder`, and so is what reached
    each block meanwhile. With a `journal`, which is then of that folder, the walk goes on where it was cut short. Each
    of several `processes` takes its share of the samples, in a folder of its own, and has the sums over all of them.
    """
    size = min(evaluation_batch(network, samples.longest), calibration_batch(samples.longest))
    size = min(size, max(len(samples.ids) // processes.world_size, 1))
    size = 1 if fisher.of_samples else size  # whose gradients are of single samples, which experts mix
    lasting = journal is not None
    earlier, batches = processes.shard(samples.batches(size))
    with clock.phase("probe"):
        flows = start(network, batches, TensorStore(folder, "probe", lasting))
    inputs = forward_walk(network, flows, flows, clock, step, journal)
    found = StoredFactors(folder)
    with clock.phase("probe"):
        state = None if journal is None else _recalled(journal, network, found, processes)
        shelf = TensorStore(folder, "gradient", lasting)
        walk = BackwardPass(network, flows, inputs, seed, fisher.of_samples, shelf, state, processes, earlier)
        for _ in range(1 + len(network.blocks) - walk.state.reached):
            step()
        for factors in output_factors(walk, whole, fisher):
            files = {name: found.keep(name, factor) for name, factor in factors.items()}
            if journal is not None:
                _note(journal, walk, files)
            step()
    return found


def _note(journal: Journal, walk: BackwardPass, files: dict[str, Path]) -> None:
    """Note that a walk back has passed a block, whose factors are in `files`."""
    reached = walk.state.reached
    names = {name: path.name for name, path in files.items()}
    journal.record(f"factors-{reached}", {"factors": names}, list(files.values()))
    journal.record_tensors(f"gradient-{reached}", walk.state.gradients, {"scale": walk.scale})
    journal.forget(f"gradient-{reached + 2}")


def _recalled(journal: Journal, network: Network, found: StoredFactors, processes: Processes) -> BackwardState | None:
    """How far a walk back had come in all processes, and in `found` what it had found; None if that was nothing."""
    last = len(network.blocks)
    reached, notes = last, list[dict[str, Any]]()
    while reached and (note := journal.recall(f"factors-{reached - 1}")) is not None:
        notes.append(note)
        reached -= 1
    kept = {number: journal.recall_tensors(f"gradient-{number}", network.device) for number in range(reached, last)}
    reached = next((number for number in range(reached, last) if kept[number] is not None), last)
    reached = last - processes.all_reduce_min(last - reached)
    recalled = kept.get(reached)
    if not processes.all_reduce_min(recalled is not None) or recalled is None:
        return None
    for note in notes[: last - reached]:
        for name, file in note["factors"].items():
            found.add(name, journal.folder / file, network.device)
    return BackwardState(reached, recalled[1]["scale"], recalled[0])


def forward_walk(
    network: Network,
    flows: list[StreamBatch],
    kept: list[StreamBatch],
    clock: Clock,
    step: Callable[[], None],
    journal: Journal | None = None,
) -> list[list[StoredTensor]]:
    """Take `flows` through all blocks; what reached each block of those in `kept`.

    With a `journal` they go on from the last block that they passed before.
    """
    name, inputs = flows[0].shelf.name, []
    passed = {} if journal is None else _passed(journal, name, network, every=bool(kept))
    for index, block in enumerate(network.blocks):
        inputs.append([flow.waiting for flow in kept])
        if index + 1 in passed:
            take_up(flows, passed[index + 1], index + 1)
        elif index >= max(passed, default=0):
            with clock.phase("read"), network.loaded(block) as module, clock.phase("probe"):
                advance(flows, module, index, block.name)
            if journal is not None:
                journal.record_tensors(f"{name}-{index + 1}", [flow.waiting for flow in flows], {})
                if not kept:
                    journal.forget(f"{name}-{index - 1}")
        step()
    return inputs


def _passed(journal: Journal, name: str, network: Network, every: bool) -> dict[int, list[StoredTensor]]:
    """What flows were after the blocks that they passed before, by the number of these; of `every` one, or the last."""
    found: dict[int, list[StoredTensor]] = {}
    numbers = range(1, len(network.blocks) + 1)
    for number in numbers if every else reversed(numbers):
        recalled = journal.recall_tensors(f"{name}-{number}", network.device)
        if recalled is not None:
            found[number] = recalled[0]
        if (recalled is None) == every:
            break
    return found


def output_factors(
    walk: BackwardPass,
    whole: Collection[str],
    fisher: FisherNeeds = NOTHING,
) -> Iterator[dict[str, Tensor]]:
    """Of each block what the loss feels of its layers, in nats per token, as LossFactors has it."""
    for block, passages in walk:
        factors = LossFactors(block.layers, whole, fisher)
        for passage in passages:
            factors.add(passage)
        yield factors.found(walk.scale, walk.processes)
