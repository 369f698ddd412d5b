"""Mix samples of several sources by their weights."""

from collections.abc import Sequence

from torch import Tensor


def quotas(count: int, weights: Sequence[float]) -> list[int]:
    """Return whole numbers that sum to `count` in proportion to `weights`, by largest remainders."""
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    numbers = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: numbers[index] - exact[index])
    for index in by_remainder[: count - sum(numbers)]:
        numbers[index] += 1
    return numbers


def largest_mixture(available: Sequence[int], weights: Sequence[float]) -> int:
    """Return the largest count of which no source's share, nor its quota, exceeds what is available."""
    total = sum(weights)
    count = int(min(number * total / weight for number, weight in zip(available, weights, strict=True)))
    while any(need > have for need, have in zip(quotas(count, weights), available, strict=True)):
        count -= 1
    return count


def interleave(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return all samples in one order in which every beginning has them nearly in proportion."""
    placed = [
        ((place + 0.5) / len(part), index, sample)
        for index, part in enumerate(parts)
        for place, sample in enumerate(part)
    ]
    return [sample for _, _, sample in sorted(placed, key=lambda entry: entry[:2])]
