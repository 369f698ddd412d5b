"""Any network in memory as one block, with the loss of an objective."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from hesse.curvature import Objective
from hesse.errors import OptionError
from hesse.estimation.calibrated import KnownStatistics
from hesse.estimation.statistics import (
    STATISTICS,
    BackwardCollection,
    BlockStatistic,
    Needs,
    by_statistic,
    needs_samples,
)
from hesse.networks.module_network import SingleBlock
from hesse.networks.network import Blocks, Layer
from hesse.passes.module_batch import ModuleBatch
from hesse.passes.per_sample import FisherKind, GradientPass
from hesse.passes.stream import CalibrationBatch


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
        return collection.values(gradients.scale)

    def blocks(self) -> tuple[Blocks, Sequence[CalibrationBatch]]:
        """Return the module as one block, and the objective's batches."""
        batches = [ModuleBatch(self.objective, inputs) for inputs, _ in self.objective.batches()]
        return SingleBlock(self.model, self.layers), batches
