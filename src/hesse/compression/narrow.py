"""`hesse narrow`: feed-forward layers with fewer hidden units, the weights behind them refitted."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hesse.compression.feed_forward import FeedForward, feed_forwards, width_settings
from hesse.compression.inputs import InputGrams
from hesse.compression.output import check_output, copy_companions, temporary_folder
from hesse.compression.plan import open_networks
from hesse.compression.tokens import Calibration, Selection, select_samples
from hesse.curvature import Gram
from hesse.errors import DataError, OptionError
from hesse.evaluation.evaluate import Evaluation, compare, evaluation_batch, pass_through
from hesse.formats import open_checkpoint
from hesse.models.network import Block, Layer, Network
from hesse.models.shelf import Shelf
from hesse.models.stream import advance_with_stops, calibration_batch, start
from hesse.models.writer import Parts, write_text
from hesse.progress import Clock, Progress
from hesse.solvers.linear.nystroem import kept_units, nystroem_weight

REPORT_FILE = "narrow.json"
MULTIPLE = 8  # of hidden units, which kernels want


@dataclass(frozen=True)
class NarrowedBlock:
    """A feed-forward layer of a block."""

    name: str  # of the layer that reads the hidden units
    relative_error: float | None  # E‖W z - W' z_S‖² / E‖W z‖², of the outputs; None where no sample reached it


@dataclass(frozen=True)
class NarrowReport:
    """The whole run. Sizes in bytes, losses in nats per token, half squared errors of hidden states for an encoder."""

    model: str
    out: str
    width_before: int  # of a block, all of its experts together
    width_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    loss_name: str
    measured: float
    standard_error: float | None
    samples: int
    held_out: bool
    blocks: list[NarrowedBlock]
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def narrow_checkpoint(
    model: Path,
    out: Path,
    keep: float,
    calibration: Calibration,
    *,
    device: torch.device,
    overwrite: bool,
    progress: Progress,
    name: str,
) -> NarrowReport:
    """Write the model folder `model`, which a person calls `name`, with a share `keep` of its hidden units to `out`.

    Of each feed-forward layer those units stay that have the highest ridge leverage scores on the samples, and the
    layer that reads them is the least-squares fit to what it gave before: the Nyström step of MoDeGPT (Lin et al.,
    2024). The samples go through the narrowed model; layers of one width get one, so that config.json can say it.

    Raises:
        HesseError: something is wrong with the model, the data, the options or the output; nothing is left at `out`.
    """
    clock = Clock()
    if not 0 < keep < 1:
        raise OptionError(f"--keep is {keep}, but must be a share of the hidden units between 0 and 1, such as 0.75")
    check_output(out, model, overwrite)
    _, network, _ = open_networks(model, device)
    layers = [feed_forwards(block) for block in network.blocks]
    every = [part for parts in layers for part in parts]
    widths = {part.width: max(round(keep * part.width / MULTIPLE), 1) * MULTIPLE for part in every}
    for before, after in widths.items():
        if after >= before:
            raise OptionError(
                f"--keep {keep} of {before} hidden units leaves {after}, a multiple of {MULTIPLE}: give less"
            )
    settings = width_settings(network, every, widths)
    selected = select_samples(model, calibration, network)
    with temporary_folder(out, 2 * network.checkpoint.file_bytes) as folder:
        with TemporaryDirectory(dir=folder) as waiting:
            run = _Narrow(network, layers, settings, widths, selected, calibration, folder, Path(waiting), progress)
            run.walk()
            found = run.written()
        report = NarrowReport(
            model=name,
            out=str(out),
            width_before=max(sum(part.width for part in parts) for parts in layers),
            width_after=max(sum(widths[part.width] for part in parts) for parts in layers),
            parameters_before=sum(p.numel() for p in network.model.parameters()),
            parameters_after=found.parameters,
            bytes_before=network.checkpoint.file_bytes,
            bytes_after=found.bytes,
            loss_name=found.difference_name("narrow"),
            measured=found.difference,
            standard_error=found.kl_standard_error,
            samples=found.samples,
            held_out=selected.held_out,
            blocks=run.blocks,
            notes=[*selected.notes, *run.notes, *copy_companions(model, folder)],
            seconds=clock.total,
        )
        write_text(folder / REPORT_FILE, json.dumps(report.to_dict(), indent=2) + "\n")
    return report


@dataclass(eq=False)
class _Narrow:
    """The state of one run."""

    network: Network
    layers: list[list[FeedForward]]  # of each block
    settings: dict[str, int]  # of config.json
    widths: dict[int, int]  # that were, and that will be
    selected: Selection
    calibration: Calibration
    folder: Path  # to write into
    waiting: Path  # for files that are needed meanwhile
    progress: Progress
    blocks: list[NarrowedBlock] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = Parts(self.waiting)

    def walk(self) -> None:
        """Narrow each block where the samples arrive at it, and write it."""
        network, samples = self.network, self.selected.samples
        size = self.calibration.batch_size or calibration_batch(samples.longest)
        flows, grams = start(network, samples.batches(size), Shelf(self.waiting, "narrow")), InputGrams(Clock())
        self.progress.begin("narrow", len(network.blocks))
        for index, (block, parts) in enumerate(zip(network.blocks, self.layers, strict=True)):
            made: dict[Layer, tuple[Tensor, Tensor]] = {}
            readers = {part.reader for part in parts}

            def change(
                layer: Layer, made: dict[Layer, tuple[Tensor, Tensor]] = made, readers: set[Layer] = readers
            ) -> None:
                gram = grams.gram()
                if layer in readers:
                    made[layer] = self._narrowed(layer, gram)

            with network.loaded(block):
                missed = advance_with_stops(flows, block, index, grams.collect, change)
            if lost := [layer.name for layer in missed if layer in readers]:
                raise DataError(f"{lost[0]}: no sample reached it")
            self._keep(block, parts, {layer: (units.cpu(), fitted.cpu()) for layer, (units, fitted) in made.items()})
            self.progress.advance()

    def _narrowed(self, layer: Layer, gram: Gram) -> tuple[Tensor, Tensor]:
        """The units that stay for the layer that reads them, and its weights on these, which are put in its place."""
        weight = layer.weight.float()
        count = self.widths[weight.shape[1]]
        if gram.tokens:
            units = kept_units(gram.second_moment, count)
            fitted = nystroem_weight(weight, gram.second_moment, units)
        else:  # an expert that nothing went to
            units = weight.square().sum(0).topk(count).indices.sort().values
            fitted = weight[:, units]
            self.notes.append(f"{layer.name}: no sample reached it; its units are chosen by their weights")
        whole = torch.zeros_like(weight)
        whole[:, units] = fitted.to(self.network.checkpoint.dtype(f"{layer.name}.weight")).float()
        layer.replace(whole)
        error = gram.quadratic(whole - weight) / gram.quadratic(weight) if gram.tokens else None
        self.blocks.append(NarrowedBlock(layer.name, error))
        return units, fitted

    def _keep(self, block: Block, parts: list[FeedForward], made: dict[Layer, tuple[Tensor, Tensor]]) -> None:
        """Write a block's tensors, those of its feed-forward layers without the units that are gone."""
        tensors = self.network.checkpoint.read_stored(self.network.stored_in(block))
        for part in parts:
            units, fitted = made[part.reader]
            for layer in part.makers:
                weight, bias, rows = f"{layer.name}.weight", f"{layer.name}.bias", part.rows(layer, units)
                tensors[weight] = tensors[weight][:, rows] if layer.transposed else tensors[weight][rows]
                if bias in tensors:
                    tensors[bias] = tensors[bias][rows]
            weight = f"{part.reader.name}.weight"
            tensors[weight] = (fitted.T if part.reader.transposed else fitted).to(tensors[weight].dtype)
        self.parts.add(tensors)

    def written(self) -> Evaluation:
        """Write what is left, read it back, and measure it."""
        network, checkpoint = self.network, self.network.checkpoint
        self.parts.add_left(checkpoint.stored_names(), checkpoint.read_stored)
        self.parts.assemble(self.folder)
        config = {**checkpoint.config, **self.settings}
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        check = self.selected.check
        batches = check.batches(evaluation_batch(network, check.longest))
        written = Network(open_checkpoint(self.folder), torch.float32, network.device)
        passed = [pass_through(one, batches, self.progress, "verify") for one in (written, network)]
        return compare(written, passed[0], network, passed[1], self.progress)
