"""Estimate Kronecker factors and Fisher diagonals in a backward pass, and write them block by block."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.tensor_store import TensorStore
from hesse.checkpoints.writer import write_tensors, writing
from hesse.curvature import Curvature, Diagonal, Kronecker
from hesse.estimation import Estimates, Sums, save_curvature
from hesse.estimation.backward_records import recall_backward, record_backward
from hesse.estimation.probe import forward_walk
from hesse.jobs.job import Job
from hesse.networks.network import Block, CheckpointNetwork
from hesse.passes.backward import BackwardPass, layer_part
from hesse.passes.recorded_batch import RecordedBatch
from hesse.passes.stream import start

EstimatedKind = Literal["gram", "kronecker", "fisher"]
Files = dict[str, dict[str, str]]  # names of curvature files by kind and layer

NAME = "backward"  # of the pass in the journal


def write_curvature(curvature: Curvature, folder: Path, kind: str, number: int) -> str:
    """Write a curvature as file `number` of `folder`; return the file's name."""
    name = f"{kind}-{number:05d}.safetensors"
    with writing(folder):
        save_curvature(curvature, folder / name)
    return name


def estimate_backward(
    job: Job, network: CheckpointNetwork, batches: list[Tensor], kinds: Sequence[EstimatedKind]
) -> tuple[Files, dict[str, Tensor]]:
    """Write the curvatures of `kinds` in the journal's folder; return their files, and diagonals of output factors.

    The diagonals belong to Kronecker factors. An interrupted pass resumes.
    """
    journal, step = job.journal, job.progress.advance
    job.progress.begin("backward pass", 2 * len(network.blocks) + 1)
    with job.clock.phase("probe"):
        flows = start(network, batches, TensorStore(journal.folder, "forward", lasting=True))
    inputs = forward_walk(network, flows, flows, job.clock, step, journal)
    files: Files = {kind: {} for kind in kinds}
    diagonals: dict[str, Tensor] = {}
    with job.clock.phase("probe"):
        state, records = recall_backward(journal, NAME, network)
        for record in records:
            _add(record["files"], files)
            diagonals |= load_file(journal.folder / record["diagonals"])
            job.resume_clock(record["seconds"])
        store = TensorStore(journal.folder, f"{NAME}-gradient", lasting=True)
        walk = BackwardPass(network, flows, inputs, job.calibration.seed, "fisher" in kinds, store, state)
        for _ in range(1 + len(network.blocks) - walk.state.reached):
            step()
        for block, recorded in walk:
            estimates = _estimates(block, recorded, walk, kinds)
            with job.clock.phase("write"):
                number = sum(len(own) for own in files.values())
                written, found = _write(estimates, block, journal.folder, number)
                path = journal.folder / f"{NAME}-{walk.state.reached}.safetensors"
                with writing(journal.folder):
                    write_tensors(path, found)
                content = {"files": written, "diagonals": path.name, "seconds": job.phases()}
                paths = [journal.folder / name for own in written.values() for name in own.values()]
                record_backward(journal, NAME, walk, content, [*paths, path])
            _add(written, files)
            diagonals |= found
            step()
    return files, diagonals


def _add(new: Files, files: Files) -> None:
    for kind, own in new.items():
        files[kind] |= own


def _estimates(
    block: Block, recorded: Iterator[RecordedBatch], walk: BackwardPass, kinds: Sequence[EstimatedKind]
) -> Estimates:
    """Return the curvatures of a block's layers, by layer."""
    parts = {layer.name: [layer_part(layer)] for layer in block.layers}
    sums = Sums(parts, {layer.name: layer.parameter for layer in block.layers}, kinds)
    for batch in recorded:
        sums.add(batch)
    sums.leave_out_unreached()
    return sums.estimates(walk.scale, walk.origin.matrix, walk.origin.unit)


def _write(estimates: Estimates, block: Block, folder: Path, number: int) -> tuple[Files, dict[str, Tensor]]:
    """Write a block's curvatures behind `number` files; return the new ones, and the diagonals of output factors."""
    files: Files = {"kronecker": {}, "fisher": {}}
    diagonals = {}
    for layer in block.layers:
        for kind, own in files.items():
            curvature = getattr(estimates, kind).get(layer.name)
            if isinstance(curvature, Kronecker | Diagonal):
                number += 1
                own[layer.name] = write_curvature(curvature, folder, kind, number)
            if isinstance(curvature, Kronecker):
                diagonals[layer.name] = curvature.output_factor.diagonal().clone()  # a view would keep the whole factor
    return {kind: own for kind, own in files.items() if own}, diagonals
