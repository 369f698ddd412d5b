"""Compare the compressed and the dense checkpoint in one pass: layers alone, points on the line between, two texts."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.tensor_store import TensorStore
from hesse.curvature.losses import next_tokens
from hesse.data import Samples
from hesse.evaluation.continuations import continuations
from hesse.evaluation.measurements import (
    BAND,
    LAYER_BAND,
    Continuation,
    LayerMeasurement,
    LinePoint,
    Measurements,
    TextMeasurement,
)
from hesse.evaluation.metrics import Totals, totals_of
from hesse.networks.network import Block, CheckpointNetwork, Layer, each_loaded
from hesse.passes.stream import StreamBatch, advance, evaluation_batch, finish, start
from hesse.progress import Progress

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# Each layer changed alone costs a run through all later blocks, so it uses at most this many tokens.
TOKENS_ALONE = 1024
# The batches of each run: by the name of the group that is changed alone, or by the share of the whole change.
Runs = dict[str | float, list[StreamBatch]]
EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def measure(
    network: CheckpointNetwork,
    compressed: Checkpoint,
    check: Samples,
    seen: Samples | None,
    predicted: Mapping[str, float | None],
    folder: Path,
    progress: Progress,
) -> Measurements:
    """Measure the effect of compressing the layers of `predicted`; `compressed` is the result for `network`.

    Args:
        network: the dense network.
        compressed: the compressed checkpoint.
        check: samples that calibration did not use.
        seen: the same number of samples that calibration used; None if nothing was held out.
        predicted: the predicted cost of each compressed layer, in nats per token; None without a prediction.
        folder: where hidden states are stored.
        progress: receives each phase and step.
    """
    language_model = network.kind == "causal-lm"
    progress.begin("measure", len(network.blocks) + 1 + 2 * language_model)
    comparison = LayerwiseComparison(network, compressed, check, seen, folder)
    comparison.run(set(predicted), progress.advance)
    notes, texts = list[str](), list[Continuation]()
    if language_model:
        texts, notes = continuations(network, compressed, check, progress.advance)
    on_check, on_seen = comparison.texts()
    line = comparison.line(sum(value or 0.0 for value in predicted.values()))
    return Measurements(BAND, LAYER_BAND, comparison.layers(predicted), line, on_check, on_seen, texts, notes)


class LayerwiseComparison:
    """Comparison of two checkpoints in one pass that holds one block of each; it makes blocks + 1 steps.

    The disk holds the samples' hidden states, and those of `TOKENS_ALONE` tokens for each layer.
    """

    def __init__(
        self, network: CheckpointNetwork, compressed: Checkpoint, check: Samples, seen: Samples | None, folder: Path
    ) -> None:
        self._network = network
        self._compressed = CheckpointNetwork(compressed, torch.float32, network.device).tensors
        size = evaluation_batch(network, check.longest)
        few = [ids[: max(TOKENS_ALONE // len(check.ids), 2)] for ids in check.ids]
        if not any(bool((next_tokens(ids[None]) >= 0).any()) for ids in few):  # nothing of the beginnings is scored
            few = list(check.ids)
        self._dense = {
            "check": start(network, check.batches(size), TensorStore(folder, "measured")),
            "seen": [] if seen is None else start(network, seen.batches(size), TensorStore(folder, "seen")),
            "few": start(network, replace(check, ids=tuple(few)).batches(size), TensorStore(folder, "few")),
        }
        self._line: Runs = {share: branch(self._dense["check"]) for share in SHARES}
        self._seen = branch(self._dense["seen"])
        self._alone: Runs = {}
        self._members: dict[str, list[str]] = {}

    def run(self, changed: set[str], step: Callable[[], None]) -> None:
        """Run all batches through both models; `changed` are the names of the layers that differ."""
        for index, block in each_loaded(self._network):
            self._block(index, block, [layer for layer in block.layers if layer.name in changed])
            step()
        self._totals = self._compare()
        step()

    def layers(self, predicted: Mapping[str, float | None]) -> list[LayerMeasurement]:
        """Return the measured and predicted cost of each layer changed alone."""
        measurements = []
        for name, members in self._members.items():
            parts = [part for member in members if (part := predicted[member]) is not None]
            total = sum(parts) if parts else None
            measurements.append(LayerMeasurement(name, members, total, self._totals[name].mean_divergence()))
        return measurements

    def line(self, predicted: float) -> list[LinePoint]:
        """Return the costs of shares of the change of all layers; `predicted` is the cost of the whole change."""
        return [LinePoint(share, share**2 * predicted, self._totals[share].mean_divergence()) for share in SHARES]

    def texts(self) -> tuple[TextMeasurement, TextMeasurement | None]:
        """Return the effect of the whole change on the check samples, and on samples that calibration used."""
        seen = _text(self._totals["seen"], self._seen) if self._seen else None
        return _text(self._totals[1.0], self._dense["check"]), seen

    def _block(self, index: int, block: Block, layers: list[Layer]) -> None:
        stored = self._compressed.read(f"{layer.name}.weight" for layer in layers)
        weights = {layer.name: stored[f"{layer.name}.weight"].to(layer.parameter) for layer in layers}
        for flows in self._alone.values():
            advance(flows, block.module, index)
        for name, members in _groups(layers).items():
            self._members[name] = [layer.name for layer in members]
            self._alone[name] = branch(self._dense["few"])
            with _interpolated_weights(members, weights, 1.0):
                advance(self._alone[name], block.module, index)
        for share in SHARES:
            with _interpolated_weights(layers, weights, share):
                advance([*self._line[share], *(self._seen if share == 1.0 else ())], block.module, index)
        for flows in self._dense.values():
            advance(flows, block.module, index)

    def _compare(self) -> dict[str | float, Totals]:
        """Return the differences between each run's predictions and the dense ones on the same samples."""
        runs: dict[str, Runs] = {"few": self._alone, "check": self._line, "seen": {"seen": self._seen}}
        differences: dict[str | float, Totals] = {}
        with self._network.surroundings() as model, torch.no_grad():
            for kind, several in runs.items():
                differences.update({key: totals_of(self._network) for key in several})
                for number, dense in enumerate(self._dense[kind]):
                    expected = finish(self._network, model, dense)
                    for key, flows in several.items():
                        differences[key].add(finish(self._network, model, flows[number]), dense.targets, expected)
        return differences


def _text(totals: Totals, flows: list[StreamBatch]) -> TextMeasurement:
    """Return the effect on a text, of which `flows` are the samples."""
    quality = totals.quality()
    losses = quality.get("reference_loss"), quality.get("loss"), quality.get("top1_agreement")
    return TextMeasurement(sum(len(flow.ids) for flow in flows), totals.tokens, totals.mean_divergence(), *losses)


def branch(flows: list[StreamBatch]) -> list[StreamBatch]:
    """Copy the batches, to continue from their present state through other weights."""
    return [replace(flow) for flow in flows]


def _groups(layers: list[Layer]) -> dict[str, list[Layer]]:
    """Group layers to change together: one layer, or a block's layers whose names differ only in the expert number."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(EXPERT.sub("*", layer.name), []).append(layer)
    return groups


@contextmanager
def _interpolated_weights(layers: list[Layer], weights: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Move the layers by `share` of the way to `weights` while inside; 1 gives exactly `weights`."""
    dense = [layer.parameter for layer in layers]
    try:
        for layer, weight in zip(layers, dense, strict=True):
            moved = torch.lerp(weight, weights[layer.name], share)
            layer.module.weight = nn.Parameter(moved, requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, dense, strict=True):
            layer.module.weight = weight
