"""Per-sample gradients of an objective, a few samples at a time."""

from collections.abc import Iterator

from torch import Tensor

from hesse.curvature import Objective
from hesse.errors import DataError
from hesse.finite import all_finite
from hesse.passes.per_sample import BUDGET, FisherKind, GradientPass
from hesse.passes.sample_gradients import flat_gradients


def per_sample_gradients(
    objective: Objective, kind: FisherKind, *, seed: int = 0, budget: int = BUDGET
) -> Iterator[Tensor]:
    """Yield the gradients of each sample's summed loss, (samples, parameters), at most `budget` bytes at a time.

    `kind="empirical"` uses the labels of the data, `"sampled"` draws one label per term from the model itself. Samples
    must not depend on one another: layers with batch statistics are refused.

    Raises:
        DataError: a gradient is not finite.
        OptionError: the budget is smaller than one gradient.
    """
    size = objective.size * objective.parameters[0].element_size()
    walk = GradientPass(objective, kind, seed=seed, budget=budget, extra=size)
    for passage in walk:
        flat = flat_gradients(passage, walk.parts, objective.named)
        if not all_finite(flat):
            raise DataError("a per-sample gradient holds NaN or infinity: the loss overflows on this data")
        yield flat
