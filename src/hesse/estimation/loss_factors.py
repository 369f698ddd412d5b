"""What the loss feels of layers: E[ggᵀ] at their outputs, and the Fisher on their weights."""

from collections.abc import Collection

from torch import Tensor

from hesse.estimation import OutputMoments
from hesse.estimation.weight_fisher import NOTHING, FisherNeeds, WeightFisher
from hesse.networks.network import Layer
from hesse.passes.backward import layer_part
from hesse.passes.recorded_batch import RecordedBatch
from hesse.processes import ALONE, Processes


class LossFactors:
    """Sums over the passages of a walk, per position, of some layers.

    E[ggᵀ] (out, out) for the layers `whole`, its diagonal E[g²] (out,) for others. With the Gram of the layer's inputs
    it gives the loss increase of a change d as ½ tr(E[ggᵀ] d E[xxᵀ] dᵀ), the other factor of a Kronecker. By the
    weights' names the Fisher on them, as `fisher` says.
    """

    def __init__(self, layers: Collection[Layer], whole: Collection[str], fisher: FisherNeeds = NOTHING) -> None:
        self._moments = [
            OutputMoments([layer_part(layer) for layer in some], "position", diagonal)
            for diagonal in (False, True)
            if (some := [layer for layer in layers if (layer.name in whole) != diagonal])
        ]
        self._weights = WeightFisher(layers, fisher)

    def add(self, passage: RecordedBatch) -> None:
        """Add what a passage shows."""
        for moments in self._moments:
            moments.add(passage)
        self._weights.add(passage)

    def found(self, scale: float, processes: Processes = ALONE) -> dict[str, Tensor]:
        """By name, sums times `scale`, which makes them means over terms of the loss; without what nothing reached."""
        for moment in (moment for sums in self._moments for moment in sums.sums.values()):
            processes.all_reduce(moment.total)
            moment.count = processes.all_reduce_sum(moment.count)
        return {
            modules[0]: moment.times(scale, f"gradients at the outputs of {modules[0]}")
            for sums in self._moments
            for modules, moment in sums.sums.items()
            if moment.count
        } | self._weights.found(scale, processes)
