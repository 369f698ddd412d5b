"""Networks in memory with their data: a language model block by block, as on disk, or any module as one block."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hesse.checkpoints.tensor_store import InMemory
from hesse.curvature import CrossEntropy, Objective
from hesse.curvature.losses import input_ids, next_tokens, scored_tokens
from hesse.data.selection import Calibration, sample_length, select_samples
from hesse.errors import OptionError
from hesse.estimation.calibrated import KnownStatistics
from hesse.estimation.probe import probe
from hesse.estimation.statistics import (
    STATISTICS,
    BackwardCollection,
    BlockStatistic,
    Needs,
    by_statistic,
    needs_samples,
    probe_tokens,
)
from hesse.networks.families import ROUTERS
from hesse.networks.module_network import ModuleBatch, ModuleNetwork, SingleBlock
from hesse.networks.network import Blocks, Layer
from hesse.passes.block_calls import model_inputs
from hesse.passes.per_sample import FisherKind, GradientPass
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
        return [layer for layer in inside if not any(part in ROUTERS for part in layer.name.split("."))]

    def loss(self) -> float:
        """Return the mean loss of the samples that the result is measured on."""
        loss, total, count = CrossEntropy(), 0.0, 0
        check = self._selected.check
        with torch.no_grad():
            for ids in check.batches(evaluation_batch(self._network, check.longest)):
                ids = ids.to(self._network.device)
                targets = scored_tokens(ids) if self._network.kind == "seq2seq-lm" else next_tokens(ids)
                inputs = model_inputs(self._network, self.model, input_ids(ids))
                logits = self.model(**inputs, use_cache=False).logits.float()
                total += float(loss.terms(logits, targets).double().sum())
                count += loss.count(targets) or 0
        return total / count

    def known(self) -> KnownStatistics:
        """Collect the backward statistics."""
        probes, seed = self._selected.probes, self._calibration.seed
        return probe(self._network, probes, self._needs, None, seed, self._clock, lambda: None)

    def blocks(self) -> tuple[Blocks, Sequence[CalibrationBatch]]:
        """Return the network and the samples at its first block."""
        samples = self._selected.samples
        size = self._calibration.batch_size or calibration_batch(samples.longest)
        return self._network, start(self._network, samples.batches(size))


class OneBlock:
    """Any module as one block, with the loss of an objective on the data that its statistics are of.

    Raises:
        OptionError: a statistic is of the blocks of a language model alone.
    """

    held_out = False

    def __init__(self, objective: Objective, layers: list[Layer], needs: Needs, kind: FisherKind, seed: int) -> None:
        self.objective, self.model, self.layers, self.notes = objective, objective.model, list(layers), list[str]()
        self._needs, self._kind, self._seed = needs, kind, seed
        self._counted = False
        if block := [
            name
            for name in by_statistic(needs)
            if isinstance(STATISTICS[name], BlockStatistic) or name == "weighted inputs"
        ]:
            raise OptionError(
                f"the {block[0]} is of the attention of a transformers language model that is given text or token ids: "
                "give these, or use curvature gram or kronecker"
            )

    def loss(self) -> float:
        """Return the loss; at the first time note the layers that are called several times in a forward."""
        if self._counted:
            return self.objective.value()
        self._counted = True
        calls: Counter[str] = Counter()

        def count(name: str, *_: object) -> None:
            calls[name] += 1

        hooks = [layer.module.register_forward_pre_hook(partial(count, layer.name)) for layer in self.layers]
        try:
            value = self.objective.value()
        finally:
            for hook in hooks:
                hook.remove()
        batches = sum(1 for _ in self.objective.data)
        several = "is called several times in a forward, and is solved for the inputs of its first call"
        self.notes += [f"{layer.name}: {several}" for layer in self.layers if calls[layer.name] > batches]
        return value

    def known(self) -> KnownStatistics:
        """Collect the backward statistics; leave out layers whose weight is used by another way than a call."""
        gradients = GradientPass(self.objective, self._kind, seed=self._seed, apart=needs_samples(self._needs))
        collection = BackwardCollection(self.layers, self._needs)
        for recorded in gradients:
            collection.add(recorded)
        for name in gradients.others:
            layer = next(layer for layer in self.layers if layer.weight_name == name)
            self.layers.remove(layer)
            self.notes.append(f"{layer.name}: left as it is: its weight is used by another way than the layer's call")
        values = collection.values(gradients.scale)
        return {layer: {name: InMemory(value).tensor for name, value in own.items()} for layer, own in values.items()}

    def blocks(self) -> tuple[Blocks, Sequence[CalibrationBatch]]:
        """Return the module as one block, and the objective's batches."""
        batches = [ModuleBatch(self.objective, inputs) for inputs, _ in self.objective.batches()]
        return SingleBlock(self.model, self.layers), batches
