"""A transformers language model in memory with text or token ids: the passes are those of a checkpoint on disk."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hesse.curvature import CrossEntropy
from hesse.curvature.losses import input_ids, next_tokens
from hesse.data.selection import Calibration, sample_length, select_samples
from hesse.errors import OptionError
from hesse.estimation.calibrated import KnownStatistics
from hesse.estimation.probe import backward_statistics, forward_walk
from hesse.estimation.statistics import STATISTICS, Needs, by_statistic, needs_samples, probe_tokens
from hesse.networks.families import ROUTER_LAYERS
from hesse.networks.module_network import ModuleNetwork
from hesse.networks.network import Blocks, Layer
from hesse.passes.backward import BackwardPass
from hesse.passes.stream import CalibrationBatch, calibration_batch, evaluation_batch, start
from hesse.progress import Clock


class TokenStream:
    """A language model and its samples; the loss is its own, of the next token, in nats a token.

    Raises:
        HesseError: the data cannot be used, or the model does not have what a statistic needs.
    """

    def __init__(
        self, model: PreTrainedModel, layers: list[Layer], calibration: Calibration, needs: Needs, clock: Clock
    ) -> None:
        model.requires_grad_(False)
        self.model, self.layers, self.notes = model, layers, list[str]()
        self._network, self._needs, self._clock = ModuleNetwork(model, layers), needs, clock
        self._calibration = calibration
        for name, wanted in by_statistic(needs).items():
            STATISTICS[name].check_network(self._network, wanted)
        folder = Path(str(getattr(model.config, "_name_or_path", "") or "."))
        if not isinstance(calibration.data, list) and not (folder / "tokenizer_config.json").is_file():
            raise OptionError(
                "text needs the tokenizer of the local folder that the model was loaded from: give lists of token ids"
            )
        tokens = calibration.samples * sample_length(self._network, calibration.length)
        self._selected = select_samples(
            folder, calibration, self._network, probe_tokens(needs, self._network.layers, tokens)
        )
        self.notes += self._selected.notes
        self.held_out = self._selected.held_out

    @staticmethod
    def layers_in_blocks(model: PreTrainedModel, layers: Sequence[Layer]) -> list[Layer]:
        """Return the layers inside the model's blocks, without routers: those that are compressed on disk."""
        inside = ModuleNetwork(model, layers).layers
        return [layer for layer in inside if layer.name.rpartition(".")[2] not in ROUTER_LAYERS]

    def loss(self) -> float:
        """Return the mean loss of the samples that the result is measured on."""
        loss, total, count = CrossEntropy(), 0.0, 0
        check = self._selected.check
        with torch.no_grad():
            for ids in check.batches(evaluation_batch(self._network, check.longest)):
                ids = ids.to(self._network.device)
                targets = next_tokens(ids)
                logits = self.model(input_ids=input_ids(ids), use_cache=False).logits.float()
                total += float(loss.terms(logits, targets).double().sum())
                count += loss.count(targets) or 0
        return total / count

    def known(self) -> KnownStatistics:
        """Collect the backward statistics."""
        network, samples, of_samples = self._network, self._selected.probes, needs_samples(self._needs)
        size = min(evaluation_batch(network, samples.longest), calibration_batch(samples.longest))
        batches = start(network, samples.batches(1 if of_samples else size))
        inputs = forward_walk(network, batches, batches, self._clock, lambda: None)
        backward = BackwardPass(network, batches, inputs, self._calibration.seed, of_samples)
        return {
            layer: values for block in backward_statistics(backward, self._needs) for layer, values in block.items()
        }

    def blocks(self) -> tuple[Blocks, Sequence[CalibrationBatch]]:
        """Return the network and the samples at its first block."""
        samples = self._selected.samples
        size = self._calibration.batch_size or calibration_batch(samples.longest)
        return self._network, start(self._network, samples.batches(size))
