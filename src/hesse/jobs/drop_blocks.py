"""`hesse drop-blocks`: whole blocks taken out of a model on disk, or made of blocks that stay."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from hesse.checkpoints.output import check_output, copy_companions, temporary_folder
from hesse.checkpoints.writer import Parts, write_text
from hesse.data.selection import Calibration, Selection, select_samples
from hesse.errors import OptionError, VerificationError
from hesse.evaluation.evaluate import Evaluation, compare, pass_through
from hesse.formats import open_checkpoint
from hesse.formats.opening import open_networks
from hesse.jobs.drop_report import DroppedBlock, DropReport
from hesse.layerwise.weight_sharing import StandIns
from hesse.networks.block_config import fewer_blocks_config, fewer_blocks_names
from hesse.networks.network import Network
from hesse.passes.batch_sizes import evaluation_batch
from hesse.passes.stream import advance, start
from hesse.progress import Clock, Progress
from hesse.scores import find_score
from hesse.scores.blocks import Removals

REPORT_FILE = "blocks.json"
IMPORTANCES = ("loss", "cosine", "quadratic")
MOST_DIFFERENCE = 1e-6  # nats per token between what was written and the dense model run without the blocks


@dataclass(frozen=True)
class DropRequest:
    """How many blocks go, or what loss they may cost at most, and how they are chosen.

    Raises:
        OptionError: not exactly one limit is given, or a value has no meaning.
    """

    blocks: int | None = None
    loss: float | None = None  # nats per token, measured on the samples that blocks are judged by
    importance: str = "loss"
    share_rank: int | None = None

    def __post_init__(self) -> None:
        if (self.blocks is None) == (self.loss is None):
            raise OptionError("give one limit: --blocks to drop, or the --loss that they may cost at most")
        if self.importance not in IMPORTANCES:
            raise OptionError(f"there is no importance {self.importance!r}: use {', '.join(IMPORTANCES)}")
        if self.blocks is not None and self.blocks < 1:
            raise OptionError(f"--blocks is {self.blocks}, but must be at least 1")
        if self.loss is not None and not 0 < self.loss < float("inf"):
            raise OptionError(f"--loss is {self.loss}: give a number of nats per token above 0")


def drop_blocks_checkpoint(
    model: Path,
    out: Path,
    request: DropRequest,
    calibration: Calibration,
    *,
    device: torch.device,
    overwrite: bool,
    progress: Progress,
    name: str,
) -> DropReport:
    """Write the model folder `model`, which a person calls `name`, without some of its blocks to `out`.

    With the importance "loss" blocks go one at a time, always the one whose removal costs least by measurement (greedy,
    as AxFormer, Nagarajan et al., 2020); with another in the order of their scores on the whole model, each removal
    measured as well. With a `share_rank` they are not taken out but made of blocks that stay: `StandIns`.

    Raises:
        HesseError: something is wrong with the model, the data, the options or the output; nothing is left at `out`.
    """
    clock = Clock()
    check_output(out, model, overwrite)
    _, network, _ = open_networks(model, device)
    if request.blocks is not None and request.blocks >= len(network.blocks):
        raise OptionError(f"--blocks is {request.blocks}, but the model has {len(network.blocks)}: one must stay")
    stand_ins = None if request.share_rank is None else StandIns(network, request.share_rank)
    if stand_ins is None:
        fewer_blocks_config(network, range(len(network.blocks)))
        fewer_blocks_names(network, range(len(network.blocks)))
    selected = select_samples(model, calibration, network)
    with temporary_folder(out, 3 * network.checkpoint.file_bytes) as folder:
        with TemporaryDirectory(dir=folder) as waiting:
            run = _Drop(network, stand_ins, request, selected, calibration, folder, Path(waiting), progress)
            report = run.run(name, out)
        report = replace(report, seconds={"total": clock.total})
        report = replace(report, notes=[*report.notes, *copy_companions(model, folder)])
        write_text(folder / REPORT_FILE, json.dumps(report.to_dict(), indent=2) + "\n")
    return report


@dataclass(eq=False)
class _Drop:
    """The state of one run."""

    network: Network
    stand_ins: StandIns | None
    request: DropRequest
    selected: Selection
    calibration: Calibration
    folder: Path  # to write into
    waiting: Path  # for files that are needed meanwhile
    progress: Progress
    dropped: list[DroppedBlock] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def kept(self) -> list[int]:
        """The blocks that stay."""
        gone = {drop.block for drop in self.dropped}
        return [number for number in range(len(self.network.blocks)) if number not in gone]

    def run(self, name: str, out: Path) -> DropReport:
        """Do it all; everything is written into the folder."""
        network, checkpoint = self.network, self.network.checkpoint
        samples = self.selected.samples
        size = self.calibration.batch_size or evaluation_batch(network, samples.longest)
        batches = samples.batches(size)
        self._choose(batches)
        if not self.dropped:
            raise OptionError(
                f"no block can go: the cheapest costs {min(self.scores):.4g} nats per token, above --loss "
                f"{self.request.loss:g}"
            )
        made: dict[str, Tensor] = {}
        if self.stand_ins is not None:
            donors = {drop.block: self.stand_ins.donor(network.blocks[drop.block], self.kept) for drop in self.dropped}
            made, errors = self.stand_ins.replace(donors, batches, self.waiting, self.progress)
            self.dropped = [
                replace(drop, donor=donors[drop.block], relative_error=errors[drop.block]) for drop in self.dropped
            ]
        parameters = sum(p.numel() for p in network.model.parameters())
        self._write(made)
        found = self._measured()
        return DropReport(
            model=name,
            out=str(out),
            importance=self.request.importance,
            share_rank=self.request.share_rank,
            scores=self.scores,
            dropped=self.dropped,
            kept=self.kept,
            parameters_before=parameters,
            parameters_after=parameters - sum(self._saved(drop.block) for drop in self.dropped),
            bytes_before=checkpoint.file_bytes,
            bytes_after=open_checkpoint(self.folder).file_bytes,
            loss_name=found.difference_name("changed"),
            measured=found.difference,
            standard_error=found.kl_standard_error,
            samples=found.samples,
            held_out=self.selected.held_out,
            notes=self.selected.notes,
            seconds={},
        )

    def _choose(self, batches: list[Tensor]) -> None:
        """Decide which blocks go, in order, until the limit is reached."""
        removals = Removals(self.network, batches, self.waiting, self.progress, self.calibration.seed)
        most = self.request.blocks or len(self.network.blocks) - 1
        order: list[int] = []
        if self.request.importance != "loss":
            self.scores = find_score(self.request.importance).costs(removals, removals.partition).tolist()
            order = sorted(range(len(self.scores)), key=self.scores.__getitem__)
        while len(self.dropped) < most:
            measured = removals.without(self.kept, [order[len(self.dropped)]] if order else self.kept)
            costs = {number: found.value for number, found in measured.items()}
            self.scores = self.scores or [costs[number] for number in sorted(costs)]
            number = min(costs, key=costs.__getitem__)
            if self.request.loss is not None and costs[number] > self.request.loss:
                return
            score = self.scores[number] if order else costs[number]
            self.dropped.append(DroppedBlock(number, score, costs[number]))

    def _saved(self, number: int) -> int:
        """Parameters that need not be stored, once a block is gone or has a stand-in."""
        block = self.network.blocks[number]
        if self.stand_ins is not None:
            return sum(layer.weight.numel() for layer in block.layers) - self.stand_ins.parameters(block)
        return sum(parameter.numel() for parameter in block.module.parameters())

    def _write(self, made: dict[str, Tensor]) -> None:
        """The tensors that stay or were made, a block at a time, and the config."""
        network, checkpoint = self.network, self.network.checkpoint
        whole = list(range(len(network.blocks))) if self.stand_ins is not None else self.kept
        config = checkpoint.config if self.stand_ins is not None else fewer_blocks_config(network, whole)
        names, parts = fewer_blocks_names(network, whole), Parts(self.waiting)
        for group in [*(network.stored_in(network.blocks[number]) for number in whole), *([name] for name in names)]:
            left = [name for name in group if names[name] not in parts.names]
            if left:
                tensors = {**checkpoint.read_stored(left), **{name: made[name] for name in left if name in made}}
                parts.add({names[name]: tensor for name, tensor in tensors.items()})
        parts.assemble(self.folder)
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")

    def _measured(self) -> Evaluation:
        """Read back what was written, see that it is the model without the blocks, and measure it on other samples.

        Raises:
            VerificationError: its blocks do not do what they did in their places before.
        """
        network, check = self.network, self.selected.check
        batches = check.batches(evaluation_batch(network, check.longest))
        written = Network(open_checkpoint(self.folder), torch.float32, network.device)
        flows = pass_through(written, batches, self.progress, "verify")
        if self.stand_ins is None:
            skipping = start(network, batches)
            for number in self.kept:
                with network.loaded(network.blocks[number]) as module:
                    advance(skipping, module, number)
            same = compare(written, flows, network, skipping, self.progress)
            if not same.difference <= MOST_DIFFERENCE:
                raise VerificationError(
                    f"the blocks of {type(network.model).__name__} do other things in other places "
                    f"({same.difference:.4g} nats per token): nothing was put in place; they cannot be dropped from "
                    "this architecture"
                )
        return compare(written, flows, network, pass_through(network, batches, self.progress, "dense"), self.progress)
