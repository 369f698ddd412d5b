"""One share of zeros over several layers: against sorting all of it, and LAMP against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hesse.partitions import Tiles
from hesse.scores import StoredWeights, find_score
from hesse.scores.layer_shares import dropped_by_layer
from hesse.testing import normal, seeds


def costs(score: str, weight: torch.Tensor) -> torch.Tensor:
    return find_score(score).costs(StoredWeights({"w": weight.float()}), Tiles({"w": weight.shape}))


@given(seed=seeds, amount=st.floats(0, 0.99), coarse=st.booleans())
def test_the_smallest_of_all_layers_go(seed: int, amount: float, coarse: bool) -> None:
    layers = {f"layer {k}": normal(seed + k, 7 + k, 11).float() * 10.0 ** (k - 2) for k in range(4)}
    if coarse:  # many are equal
        layers = {name: (weight * 2).round() for name, weight in layers.items()}
    found = dropped_by_layer({name: lambda w=w: costs("magnitude", w) for name, w in layers.items()}, amount)
    every = torch.cat([costs("magnitude", weight) for weight in layers.values()])
    number = round(amount * len(every))
    assert sum(found.values()) == number
    if number:
        threshold = every.sort().values[number - 1]
        for name, weight in layers.items():
            scores = costs("magnitude", weight)
            assert int((scores < threshold).sum()) <= found[name] <= int((scores <= threshold).sum())


def test_lamp_is_its_definition() -> None:
    weight = normal(0, 5, 6)
    squares = weight.flatten().square()
    expected = [float(s / squares[squares >= s].sum()) for s in squares]
    assert costs("lamp", weight).tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(costs("lamp", torch.zeros(2, 3)), torch.zeros(6))


def test_lamp_leaves_something_of_every_layer_and_one_threshold_does_not() -> None:
    layers = {"small": normal(1, 20, 20) * 1e-3, "large": normal(2, 20, 20)}
    reading = {
        score: {name: lambda w=w, score=score: costs(score, w) for name, w in layers.items()}
        for score in ("magnitude", "lamp")
    }
    assert dropped_by_layer(reading["magnitude"], 0.5) == {"small": 399, "large": 1} or (
        dropped_by_layer(reading["magnitude"], 0.5)["small"] >= 395
    )
    adaptive = dropped_by_layer(reading["lamp"], 0.5)
    assert abs(adaptive["small"] - adaptive["large"]) < 40
    nearly = dropped_by_layer(reading["lamp"], 0.99)
    assert max(nearly.values()) < 400
