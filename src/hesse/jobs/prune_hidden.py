"""Hidden units of feed-forward layers pruned on disk, with the layers that read them refitted."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.data.selection import Calibration
from hesse.errors import DataError, OptionError
from hesse.estimation.calibrated import Layers
from hesse.formats import open_networks
from hesse.jobs.forecast import Work, hidden_bytes, tokens_of
from hesse.jobs.job import Job
from hesse.jobs.memory import calibration_phases, comparison_phases
from hesse.jobs.options import RunOptions
from hesse.jobs.recorded_blocks import BlockRecord
from hesse.jobs.task import Task, run_task
from hesse.methods.strategies import STRATEGIES
from hesse.networks.feed_forward import FeedForward, feed_forwards, width_settings
from hesse.networks.network import Block, Layer
from hesse.options import setting
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
    options = {"options": repr(strategy)}
    return run_task("prune", [model], out, calibration, run, options, lambda job: _Narrowing(job, strategy.keep))


class _Narrowing(Task[HiddenReport]):
    """Each block narrowed where the samples arrive at it, then written and measured."""

    def __init__(self, job: Job, keep: float) -> None:
        _, network, _ = open_networks(job.sources[0], job.run.device)
        network.check_layers_stored()
        super().__init__(job, network)
        self.needed_bytes = 2 * network.checkpoint.file_bytes
        self.needed_bytes += 3 * hidden_bytes(network, tokens_of(self.selected.samples))
        self.parts = [feed_forwards(block) for block in network.blocks]
        every = [part for parts in self.parts for part in parts]
        self.widths = {part.width: max(round(keep * part.width / MULTIPLE), 1) * MULTIPLE for part in every}
        for before, after in self.widths.items():
            if after >= before:
                raise OptionError(
                    f"--keep {keep} of {before} hidden units leaves {after}, a multiple of {MULTIPLE}: give less"
                )
        self.settings = width_settings(network, every, self.widths)

    def work(self) -> Work:
        network, samples = self.network, self.selected.samples
        parts = [part for parts in self.parts for part in parts]
        workspace = {part.reader.name: self._refit_bytes(part.reader) for part in parts}
        size, tokens, batch = network.checkpoint.file_bytes, tokens_of(samples), self.batch_size * samples.longest
        return Work(
            after=size - sum(map(self._removed_bytes, parts)),
            disk=self.needed_bytes,
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

    def run(self) -> HiddenReport:
        network, checkpoint, job = self.network, self.network.checkpoint, self.job
        needs = {part.reader.name: ("inputs",) for parts in self.parts for part in parts}
        records = self.solve_blocks("narrow", needs, self._narrow_block)
        job.notes += [note for record in records for note in record["notes"]]
        job.write_rest(checkpoint.stored_names(), checkpoint.read_stored)
        job.notes += job.assemble({**checkpoint.config, **self.settings})
        evaluation = self.measure()
        return HiddenReport(
            **self.head(evaluation, "narrow"),
            method="modegpt-mlp",
            parameters_before=sum(p.numel() for p in network.model.parameters()),
            parameters_after=evaluation.parameters,
            layers=[NarrowedLayer(**layer) for record in records for layer in record["layers"]],
            width_before=max(sum(part.width for part in parts) for parts in self.parts),
            width_after=max(sum(self.widths[part.width] for part in parts) for parts in self.parts),
        )

    def _narrow_block(self, block: Block, layers: Layers, done: Sequence[object]) -> BlockRecord:
        """Refit the layers of a block that read hidden units; return its record, with its tensors."""
        parts = self.parts[len(done)]
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
        content = {"layers": [asdict(layer) for layer in narrowed], "notes": notes}
        return BlockRecord(content, self._tensors(block, parts, kept))

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


STRATEGIES.register("units_by_leverage", UnitsByLeverage)
