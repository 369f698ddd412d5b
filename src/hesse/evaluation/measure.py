"""The compressed checkpoint beside the dense one, in one walk: each layer alone, the line between them, two texts."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.tensor_store import TensorStore
from hesse.data import Samples
from hesse.evaluation.continuations import continuations
from hesse.evaluation.measurements import (
    BAND,
    LAYER_BAND,
    Continuation,
    LayerMeasurement,
    LinePoint,
    Measured,
    Measurements,
    TextMeasurement,
)
from hesse.evaluation.metrics import HiddenTotals, Totals
from hesse.networks.network import Block, Layer, Network
from hesse.passes.batch_sizes import evaluation_batch
from hesse.passes.stream import StreamBatch, advance, finish, start
from hesse.progress import Progress

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# Each layer alone costs its own run through all blocks after it: on no more tokens than this, if samples are longer.
TOKENS_ALONE = 1024
# The flows of each walk: by the name of what is changed alone, or by the share of the whole change.
Walks = dict[str | float, list[StreamBatch]]
EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def measure(
    network: Network,
    written: Checkpoint,
    check: Samples,
    seen: Samples | None,
    predicted: Mapping[str, float | None],
    folder: Path,
    progress: Progress,
) -> Measurements:
    """Measure what compressing the layers of `predicted` did to `network`; `written` is what came of it.

    `check` are samples that calibration did not see, `seen` as many that it saw, if there are both. Hidden states wait
    below `folder`.
    """
    language_model = network.kind == "causal-lm"
    progress.begin("measure", len(network.blocks) + 1 + 2 * language_model)
    beside = Beside(network, written, check, seen, folder)
    beside.walk(set(predicted), progress.advance)
    notes, written_text = list[str](), list[Continuation]()
    if language_model:
        written_text, notes = continuations(network, written, check, progress.advance)
    on_check, on_seen = beside.texts()
    line = beside.line(sum(value or 0.0 for value in predicted.values()))
    return Measurements(BAND, LAYER_BAND, beside.layers(predicted), line, on_check, on_seen, written_text, notes)


class Beside:
    """The walk, which holds one block of both models; steps as many as blocks + 1.

    On disk are the hidden states of `TOKENS_ALONE` tokens for each layer, beside the samples' own.
    """

    def __init__(
        self, network: Network, written: Checkpoint, check: Samples, seen: Samples | None, folder: Path
    ) -> None:
        self._network, self._written = network, written
        size = evaluation_batch(network, check.longest)
        few = [ids[: max(TOKENS_ALONE // len(check.ids), 2)] for ids in check.ids]
        self._dense = {
            "check": start(network, check.batches(size), TensorStore(folder, "measured")),
            "seen": [] if seen is None else start(network, seen.batches(size), TensorStore(folder, "seen")),
            "few": start(network, replace(check, ids=tuple(few)).batches(size), TensorStore(folder, "few")),
        }
        self._line: Walks = {share: branch(self._dense["check"]) for share in SHARES}
        self._seen = branch(self._dense["seen"])
        self._alone: Walks = {}
        self._members: dict[str, list[str]] = {}

    def walk(self, changed: set[str], step: Callable[[], None]) -> None:
        """Take everything through both models; `changed` are the names of the layers that differ."""
        for index, block in enumerate(self._network.blocks):
            with self._network.loaded(block) as module:
                self._block(index, module, block, [layer for layer in block.layers if layer.name in changed])
            step()
        self._totals = self._compare()
        step()

    def layers(self, predicted: Mapping[str, float | None]) -> list[LayerMeasurement]:
        """Each layer alone, beside its prediction."""
        found = []
        for name, members in self._members.items():
            parts = [part for member in members if (part := predicted[member]) is not None]
            total = sum(parts) if parts else None
            found.append(LayerMeasurement(name, members, total, self._totals[name].measured()))
        return found

    def line(self, predicted: float) -> list[LinePoint]:
        """All layers changed by shares of their change; `predicted` is for the whole of it."""
        return [LinePoint(share, share**2 * predicted, self._totals[share].measured()) for share in SHARES]

    def texts(self) -> tuple[TextMeasurement, TextMeasurement | None]:
        """The whole change on the check samples, and on those that calibration saw."""
        seen = self._totals["seen"].text(self._seen) if self._seen else None
        return self._totals[1.0].text(self._dense["check"]), seen

    def _block(self, index: int, module: nn.Module, block: Block, layers: list[Layer]) -> None:
        written = self._written.read(f"{layer.name}.weight" for layer in layers)
        weights = {layer.name: written[f"{layer.name}.weight"].to(layer.parameter) for layer in layers}
        for flows in self._alone.values():
            advance(flows, module, index)
        for name, members in _groups(layers).items():
            self._members[name] = [layer.name for layer in members]
            self._alone[name] = branch(self._dense["few"])
            with _moved(members, weights, 1.0):
                advance(self._alone[name], module, index)
        for share in SHARES:
            with _moved(layers, weights, share):
                advance([*self._line[share], *(self._seen if share == 1.0 else ())], module, index)
        for flows in self._dense.values():
            advance(flows, module, index)

    def _compare(self) -> "dict[str | float, Difference]":
        """What the flows of each walk predict, against the dense ones from the same samples."""
        of_dense: dict[str, Walks] = {"few": self._alone, "check": self._line, "seen": {"seen": self._seen}}
        found: dict[str | float, Difference] = {}
        with self._network.surroundings() as model, torch.no_grad():
            for kind, several in of_dense.items():
                found.update({key: Difference(self._network.kind == "encoder") for key in several})
                for number, dense in enumerate(self._dense[kind]):
                    wanted = finish(self._network, model, dense)
                    for key, flows in several.items():
                        found[key].add(finish(self._network, model, flows[number]), dense.ids, wanted)
        return found


class Difference:
    """Sums over tokens of how far one model is from another."""

    def __init__(self, encoder: bool) -> None:
        self._encoder, self._totals, self._hidden = encoder, Totals(), HiddenTotals()

    def add(self, result: Tensor, ids: Tensor, wanted: Tensor) -> None:
        if self._encoder:
            self._hidden.add(result, wanted)
        else:
            self._totals.add(result, ids, wanted)

    def measured(self) -> Measured:
        return Measured(*(self._hidden if self._encoder else self._totals).mean_divergence())

    def text(self, flows: list[StreamBatch]) -> TextMeasurement:
        totals, samples = self._totals, sum(len(flow.ids) for flow in flows)
        if self._encoder:
            return TextMeasurement(samples, self._hidden.tokens, self.measured(), None, None, None)
        losses = (totals.reference_loss / totals.tokens, totals.loss / totals.tokens)
        return TextMeasurement(samples, totals.tokens, self.measured(), *losses, totals.agreement / totals.tokens)


def branch(flows: list[StreamBatch]) -> list[StreamBatch]:
    """The same samples at the same place, to go another way from here."""
    return [replace(flow) for flow in flows]


def _groups(layers: list[Layer]) -> dict[str, list[Layer]]:
    """What is changed together: one layer, or the layers of a block whose names differ in an expert's number only."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(EXPERT.sub("*", layer.name), []).append(layer)
    return groups


@contextmanager
def _moved(layers: list[Layer], weights: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """The layers with `share` of the way to `weights` gone; exactly there at 1."""
    dense = [layer.parameter for layer in layers]
    try:
        for layer, weight in zip(layers, dense, strict=True):
            moved = torch.lerp(weight, weights[layer.name], share)
            layer.module.weight = nn.Parameter(moved, requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, dense, strict=True):
            layer.module.weight = weight
