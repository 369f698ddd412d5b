"""`hesse rotate`: a model rewritten on disk, its function unchanged, for whatever is to round it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hesse.checkpoints.output import check_output, copy_companions, temporary_folder
from hesse.checkpoints.writer import Parts, write_text
from hesse.data.selection import Calibration, select_samples
from hesse.errors import OptionError, VerificationError
from hesse.evaluation.evaluate import compare, pass_through
from hesse.formats import open_checkpoint
from hesse.formats.opening import open_networks
from hesse.networks.network import Network
from hesse.passes.batch_sizes import evaluation_batch
from hesse.passes.stream import calibration_batch
from hesse.progress import Progress
from hesse.rewriting import ROTATIONS, Rewriting, RewritingSamples

MOST_DIVERGENCE = 1e-2  # nats per token that rounding the rotated weights to their type may make; 1e-5 is usual


@dataclass(frozen=True)
class RotationReport:
    """What was written, and how far it is from the model, which only the rounding of its weights should make it."""

    kind: str
    model: str
    out: str
    bytes_before: int
    bytes_after: int
    kl: float  # KL(model || rotated) in nats per token
    tokens: int  # it was measured on
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def rotate_checkpoint(
    model: Path,
    out: Path,
    kind: str,
    calibration: Calibration,
    *,
    device: torch.device,
    overwrite: bool,
    progress: Progress,
    name: str,
) -> RotationReport:
    """Write the model folder `model`, which a person calls `name`, rotated to `out`, a block in memory at a time.

    Raises:
        HesseError: something is wrong with the model, the data, the options or the output; nothing is left at `out`.
    """
    if kind not in ROTATIONS:
        raise OptionError(f"there is no rotation {kind!r}; there are {', '.join(ROTATIONS)}")
    check_output(out, model, overwrite)
    _, network, _ = open_networks(model, device)
    rewriting = Rewriting(kind, network)
    selected = select_samples(model, calibration, network)
    checkpoint = rewriting.checkpoint
    notes = list(selected.notes)
    if len(checkpoint.names()) > len(network.checkpoint.names()):
        notes.append("the head was the embeddings, and reads the last norm's scales now: it is a tensor of its own")
    with temporary_folder(out, 3 * checkpoint.stored_bytes + (1 << 20)) as folder:
        waiting = folder / "waiting"
        waiting.mkdir()
        progress.begin("rotate", len(network.blocks))
        batches = selected.samples.batches(calibration.batch_size or calibration_batch(selected.samples.longest))
        rewriting.find(RewritingSamples(batches, {}, calibration.seed, waiting, progress.advance))
        _write(rewriting, network, waiting, folder)
        for path in waiting.iterdir():
            path.unlink()
        waiting.rmdir()
        write_text(folder / "config.json", json.dumps(checkpoint.config, indent=2) + "\n")
        notes += copy_companions(model, folder)
        check = selected.check.batches(evaluation_batch(network, selected.check.longest))
        written = Network(open_checkpoint(folder), torch.float32, device)
        passed = [
            pass_through(one, check, progress, phase) for one, phase in ((written, "check"), (network, "compare"))
        ]
        found = compare(written, passed[0], network, passed[1], progress)
        assert found.kl is not None
        if not found.kl <= MOST_DIVERGENCE:
            raise VerificationError(
                f"the rotated model differs from {name} by {found.kl:.4g} nats per token: its weights lose too much in "
                f"their type; nothing was put in place"
            )
        sizes = network.checkpoint.file_bytes, written.checkpoint.file_bytes
    return RotationReport(kind, name, str(out), *sizes, found.kl, found.tokens, notes)


def _write(rewriting: Rewriting, network: Network, waiting: Path, folder: Path) -> None:
    """All tensors of the rewritten model to `folder`, by way of files of a block each."""
    checkpoint, parts = rewriting.checkpoint, Parts(waiting)
    for block in network.blocks:
        parts.add(checkpoint.read_stored(network.stored_in(block)))
    parts.add_left(checkpoint.names(), checkpoint.read_stored)
    parts.assemble(folder)
