"""One share of zeros for several layers: how many weights each loses, where all are ranked together."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

HIGH, LOW = 16, 15  # bits of a float32 that is not negative, looked at in two passes

LayerCosts = Callable[[], Tensor]  # of one layer's weights, 0 or more, in any order; read again for each pass


def dropped_by_layer(scores: Mapping[str, LayerCosts], amount: float) -> dict[str, int]:
    """Return how many weights each layer loses, if of all layers' together the share `amount` of the least is removed.

    One layer's scores are in memory at a time. Their bits, whose order is that of the numbers, are counted in two
    passes, so that the threshold is exact. Of weights that lie on the threshold those of the first layers are removed.
    """
    sizes: dict[str, int] = {}
    counts = torch.zeros(1 << HIGH, dtype=torch.int64)
    for name, read in scores.items():
        bits = _bits(read())
        sizes[name] = len(bits)
        counts += torch.bincount(bits >> LOW, minlength=1 << HIGH)
    wanted = round(amount * sum(sizes.values()))
    if wanted == 0:
        return dict.fromkeys(sizes, 0)
    high, before = _place(counts, wanted)
    counts = torch.zeros(1 << LOW, dtype=torch.int64)
    for read in scores.values():
        bits = _bits(read())
        counts += torch.bincount(bits[bits >> LOW == high] & ((1 << LOW) - 1), minlength=1 << LOW)
    low, before = _place(counts, wanted - before)
    threshold = (high << LOW) | low
    found, ties = {}, {}
    for name, read in scores.items():
        bits = _bits(read())
        found[name], ties[name] = int((bits < threshold).sum()), int((bits == threshold).sum())
    left = wanted - sum(found.values())
    for name, number in ties.items():
        taken = min(number, left)
        found[name], left = found[name] + taken, left - taken
    return found


def _bits(scores: Tensor) -> Tensor:
    """Float32 numbers of 0 or more as whole numbers of the same order."""
    return scores.float().flatten().clamp(min=0).cpu().view(torch.int32).long()


def _place(counts: Tensor, number: int) -> tuple[int, int]:
    """The bin that holds the number-th entry, and the number of entries in the bins before it."""
    passed = counts.cumsum(0)
    place = int(torch.searchsorted(passed, number))
    return place, int(passed[place] - counts[place])
