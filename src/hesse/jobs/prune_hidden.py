"""Hidden units of feed-forward layers pruned on disk, with the layers that read them refitted."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.locate import locate
from hesse.checkpoints.tensor_store import TensorStore
from hesse.curvature import Gram
from hesse.data.selection import Calibration, Selection, select_samples
from hesse.errors import DataError, OptionError
from hesse.estimation.calibrated import Layers, calibrated_blocks
from hesse.formats import open_checkpoint, open_networks
from hesse.jobs.forecast import Work, forecast, hidden_bytes, tokens_at_once, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import calibration_phases, comparison_phases
from hesse.jobs.options import RunOptions
from hesse.methods.strategies import STRATEGIES
from hesse.networks.feed_forward import FeedForward, feed_forwards, width_settings
from hesse.networks.network import Block, CheckpointNetwork, Layer
from hesse.options import setting
from hesse.passes.stream import calibration_batch, start
from hesse.result import ForecastReport, Report, Result
from hesse.solvers.linear.nystroem import kept_units, nystroem_weight

MULTIPLE = 8  # of hidden units, which kernels want


@dataclass(frozen=True)
class NarrowedLayer:
    """A layer that reads hidden units, of which some were removed."""

    name: str  # of the layer that reads the hidden units
    relative_error: float | None  # E‖W z - W' z_S‖² / E‖W z‖², of the outputs; None where no sample reached it


@dataclass(frozen=True, kw_only=True)
class HiddenReport(Report):
    """A model with fewer hidden units; `layers` are NarrowedLayers."""

    what: str = "hidden"
    width_before: int  # hidden units of a block, all of its experts together
    width_after: int


@dataclass(frozen=True)
class UnitsByLeverage:
    """Keep the hidden units of the highest ridge leverage scores, and refit the layers that read them.

    The layer that reads the units is the least-squares fit to what it gave before: the Nyström step of MoDeGPT (Lin et
    al., 2024). The samples go through the narrowed model; layers of one width get one, so that config.json can say it.
    """

    keep: float = setting(0.75, "Share of the hidden units that stays, the same for every block.")

    def check(self) -> None:
        """Raise OptionError if `keep` is no share."""
        if not 0 < self.keep < 1:
            raise OptionError(
                f"--keep is {self.keep}, but must be a share of the hidden units between 0 and 1, such as 0.75"
            )


def prune_hidden(
    model: str | Path, out: Path, strategy: UnitsByLeverage, calibration: Calibration, run: RunOptions
) -> Result[HiddenReport | ForecastReport]:
    """Make a model's feed-forward layers narrower; see `hesse.prune`."""
    source = locate(model)
    with Job("prune", str(model), [source], out, calibration, run) as job:
        job.check_alone()
        with job.clock.phase("read"):
            _, network, _ = open_networks(source, run.device)
            narrowing = _Narrowing(job, network, strategy.keep, select_samples(source, calibration, network))
        needed = 2 * network.checkpoint.file_bytes
        needed += 3 * hidden_bytes(network, tokens_of(narrowing.selected.samples))
        if run.dry_run:
            return Result(narrowing.forecast(needed))
        job.begin([network.checkpoint], {"options": repr(strategy)}, needed)
        narrowing.narrow_blocks()
        report = narrowing.report()
        job.finish(report)
    return Result(report)


class _Narrowing:
    """One run: each block narrowed where the samples arrive at it, then written and measured."""

    def __init__(self, job: Job, network: CheckpointNetwork, keep: float, selected: Selection) -> None:
        self.job, self.network, self.selected = job, network, selected
        self.parts = [feed_forwards(block) for block in network.blocks]
        every = [part for parts in self.parts for part in parts]
        self.widths = {part.width: max(round(keep * part.width / MULTIPLE), 1) * MULTIPLE for part in every}
        for before, after in self.widths.items():
            if after >= before:
                raise OptionError(
                    f"--keep {keep} of {before} hidden units leaves {after}, a multiple of {MULTIPLE}: give less"
                )
        self.settings = width_settings(network, every, self.widths)
        self.layers: list[NarrowedLayer] = []
        self.notes: list[str] = []

    def forecast(self, needed: int) -> ForecastReport:
        """Return the forecast of the run."""
        network, samples = self.network, self.selected.samples
        parts = [part for parts in self.parts for part in parts]
        workspace = {part.reader.name: self._refit_bytes(part.reader) for part in parts}
        size, tokens, batch = network.checkpoint.file_bytes, tokens_of(samples), tokens_at_once(self.job, samples)
        self.job.notes = [*self.selected.notes]
        work = Work(
            after=size - sum(map(self._removed_bytes, parts)),
            disk=needed,
            phases={
                **comparison_phases(network, samples.longest),
                **calibration_phases("narrow", network, tokens, batch, workspace),
            },
            forward=2 * tokens_of(self.selected.check),
            calibrated=tokens,
            bytes=5 * size,
            layers={part.reader.name: part.reader.weight.shape for part in parts},
            solve=lambda layer, known: self._refit(layer, known.gram),
        )
        return forecast(self.job, network, samples, work)

    def _refit_bytes(self, reader: Layer) -> int:
        """Return the bytes of workspace that refitting a layer takes: eigenvectors, and copies of the weight."""
        rows, columns = reader.weight.shape
        return 8 * 6 * columns**2 + 8 * 3 * rows * columns

    def _removed_bytes(self, part: FeedForward) -> int:
        """Return the bytes of the weights and biases that a feed-forward layer loses."""
        kept, checkpoint = self.widths[part.width], self.network.checkpoint
        numbers = part.reader.weight.shape[0] * (part.width - kept)
        for layer in part.writers:
            rows = layer.weight.shape[0] - len(part.rows(layer, torch.arange(kept)))
            numbers += rows * (layer.weight.shape[1] + (f"{layer.name}.bias" in checkpoint.shard_of))
        return numbers * checkpoint.dtype(f"{part.reader.name}.weight").itemsize

    def narrow_blocks(self) -> None:
        """Narrow, write and note one block after another."""
        network, job, samples = self.network, self.job, self.selected.samples
        job.progress.begin("narrow", len(network.blocks))
        size = job.calibration.batch_size or calibration_batch(samples.longest)
        with job.clock.phase("calibrate"):
            store = TensorStore(job.journal.folder, "narrow", lasting=True)
            batches = start(network, samples.batches(size), store)
        steps = job.steps("block", network, batches)
        for content in steps.done:
            self._add([NarrowedLayer(**layer) for layer in content["layers"]], content["notes"])
        needs = {part.reader.name: ("inputs",) for parts in self.parts for part in parts}
        blocks = calibrated_blocks(network, batches, needs, first=len(steps.done), clock=job.clock)
        for index, (block, layers) in enumerate(blocks, len(steps.done)):
            narrowed, notes, tensors = self._narrow_block(block, self.parts[index], layers)
            steps.note(index, {"layers": [asdict(layer) for layer in narrowed], "notes": notes}, tensors)
            self._add(narrowed, notes)

    def _add(self, narrowed: list[NarrowedLayer], notes: list[str]) -> None:
        self.layers += narrowed
        self.notes += notes
        self.job.progress.advance()

    def _narrow_block(
        self, block: Block, parts: list[FeedForward], layers: Layers
    ) -> tuple[list[NarrowedLayer], list[str], dict[str, Tensor]]:
        """Refit the layers of a block that read hidden units; return what became of them, and the block's tensors."""
        readers = {part.reader for part in parts}
        narrowed, notes = list[NarrowedLayer](), list[str]()
        kept: dict[Layer, tuple[Tensor, Tensor]] = {}
        for layer, statistics in layers:
            if layer not in readers:
                continue
            if not statistics.called:
                raise DataError(f"{layer.name}: no sample reached it")
            with self.job.clock.phase("solve"):
                units, weight, error = self._refit(layer, statistics.gram)
            kept[layer] = units.cpu(), weight.cpu()
            narrowed.append(NarrowedLayer(layer.name, error))
            if error is None:
                notes.append(f"{layer.name}: no sample reached it; its units are chosen by their weights")
        return narrowed, notes, self._tensors(block, parts, kept)

    def _refit(self, layer: Layer, gram: Gram) -> tuple[Tensor, Tensor, float | None]:
        """Return the units that stay and the layer's weight on these, which it has from now on, and the error."""
        weight = layer.weight.float()
        count = self.widths[weight.shape[1]]
        if gram.tokens:
            units = kept_units(gram.second_moment, count)
            fitted = nystroem_weight(weight, gram.second_moment, units)
        else:  # an expert that no token reached
            units = weight.square().sum(0).topk(count).indices.sort().values
            fitted = weight[:, units]
        whole = torch.zeros_like(weight)
        whole[:, units] = fitted.to(self.network.checkpoint.dtype(f"{layer.name}.weight")).float()
        layer.replace(whole)
        error = gram.quadratic(whole - weight) / gram.quadratic(weight) if gram.tokens else None
        return units, fitted, error

    def _tensors(
        self, block: Block, parts: list[FeedForward], kept: dict[Layer, tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Return a block's tensors as the files hold them, without the removed units."""
        tensors = self.network.checkpoint.read_stored(self.network.stored_in(block))
        for part in parts:
            units, fitted = kept[part.reader]
            for layer in part.writers:
                weight, bias, rows = f"{layer.name}.weight", f"{layer.name}.bias", part.rows(layer, units)
                tensors[weight] = tensors[weight][:, rows] if layer.transposed else tensors[weight][rows]
                if bias in tensors:
                    tensors[bias] = tensors[bias][rows]
            weight = f"{part.reader.name}.weight"
            tensors[weight] = (fitted.T if part.reader.transposed else fitted).to(tensors[weight].dtype)
        return tensors

    def report(self) -> HiddenReport:
        """Write the other tensors, read the result back, and measure it."""
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        job.write_rest(checkpoint.stored_names(), checkpoint.read_stored)
        job.notes = [*self.selected.notes, *self.notes, *job.assemble({**checkpoint.config, **self.settings})]
        result = CheckpointNetwork(open_checkpoint(job.folder), torch.float32, network.device)
        evaluation = job.compare(result, network, self.selected.check)
        loss = evaluation.loss_change("narrow", self.selected.held_out)
        return HiddenReport(
            **job.head(checkpoint.file_bytes, evaluation.bytes, loss),
            method="modegpt-mlp",
            parameters_before=sum(p.numel() for p in network.model.parameters()),
            parameters_after=evaluation.parameters,
            layers=self.layers,
            width_before=max(sum(part.width for part in parts) for parts in self.parts),
            width_after=max(sum(self.widths[part.width] for part in parts) for parts in self.parts),
        )


STRATEGIES.register("units_by_leverage", UnitsByLeverage)
