"""A statistic and a curvature of somebody's own, registered from outside, on disk and in memory."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesse
from helpers import IDS, compress, compress_module, dense_tensors, write_ids
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.curvature import Curvature, Kronecker
from hesse.errors import OptionError
from hesse.estimation.statistics import STATISTICS, InputStatistic
from hesse.estimation.statistics.base import InputAccumulator
from hesse.methods import Recipe, Rule
from hesse.methods.constraint_options import ConstraintOptions, SparseOptions
from hesse.methods.curvatures import CURVATURES, CurvatureKind, KnownLayer
from hesse.methods.solver_options import SolverOptions
from hesse.networks.network import CheckpointNetwork, Layer
from hesse.passes.stream import start
from hesse.processes import Processes

FolderOf = Callable[[str], Path]


class FourthMoments(InputStatistic):
    """E[x⁴] of each input (in,)."""

    name = "fourth moments"
    missing = "its fourth moments are not known"

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        return 4 * shape[1]

    def accumulator(self, layer: Layer, prepared: Any) -> InputAccumulator:
        return _Sums()


class _Sums:
    def __init__(self) -> None:
        self.total, self.tokens = torch.zeros(1), 0

    def add(self, rows: Tensor, batch: int) -> None:
        flat = rows.reshape(-1, rows.shape[-1]).float()
        self.total, self.tokens = self.total + flat.pow(4).sum(0), self.tokens + len(flat)

    def value(self, processes: Processes) -> Tensor:
        processes.all_reduce(self.total)
        return self.total / max(processes.all_reduce_sum(self.tokens), 1)


def build(known: KnownLayer, options: SolverOptions, damping: float) -> Curvature:
    """Weigh each input by the root of its fourth moment; where these are not known (a dry run), all alike."""
    moments = known.statistics.get("fourth moments")
    values = torch.ones_like(known.weight[0]) if moments is None else moments.sqrt()
    return Kronecker(output_factor=torch.ones_like(known.weight[:, 0]), input_factor=values)


def own_rule(curvature: str = "fourth_moments") -> Rule:
    """Prune half of each row by the curvature."""
    constraint = ConstraintOptions(sparse=SparseOptions(amount=0.5, scope="row"))
    return Rule(curvature=curvature, constraint=constraint, solver=SolverOptions(name="nearest"))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    STATISTICS.register("fourth moments", FourthMoments())
    needs = frozenset({"inputs", "fourth moments"})
    CURVATURES.register("fourth_moments", CurvatureKind("fourth_moments", needs, build, couples_rows=True))
    yield
    del STATISTICS._entries["fourth moments"]
    del CURVATURES._entries["fourth_moments"]


def pruned(weight: Tensor, inputs: Tensor) -> Tensor:
    """The weight without the half of each row that |w| √(E[x⁴]^½) is least of."""
    importance = weight.square() * inputs.flatten(0, -2).float().pow(4).mean(0).sqrt()
    least = importance.argsort(dim=1)[:, : weight.shape[1] // 2]
    return weight.scatter(1, least, 0.0)


def test_on_disk(family_folder: FolderOf, tmp_path: Path) -> None:
    """The first layer of a model is pruned by the fourth moments of its inputs, which nothing before it has changed."""
    source, name = family_folder("llama"), "model.layers.0.self_attn.q_proj"
    compress(source, tmp_path / "out", recipe=Recipe(rules=(own_rule(),)), data=IDS)
    network = CheckpointNetwork(Checkpoint(source), torch.float32, torch.device("cpu"))
    flows = start(network, [torch.tensor(IDS)])
    with network.loaded(network.blocks[0]) as module:
        inputs = module.input_layernorm(flows[0].hidden).detach()
        weight = network.blocks[0].layers[0].weight.detach().clone()
    assert torch.equal(dense_tensors(tmp_path / "out")[f"{name}.weight"], pruned(weight, inputs))


def test_in_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [(torch.randn(32, 12, generator=generator), torch.randint(0, 4, (32,), generator=generator))] * 2
    report = compress_module(model, batches, recipe=Recipe(rules=(own_rule(),)))
    changed = report.module.get_submodule("0").weight
    assert torch.equal(changed, pruned(model.get_submodule("0").weight.detach(), batches[0][0]))


def test_a_folder_of_statistics_does_not_have_it(family_folder: FolderOf, tmp_path: Path) -> None:
    hesse.estimate(family_folder("llama"), tmp_path / "statistics", data=write_ids(tmp_path / "ids.jsonl"))
    with pytest.raises(OptionError, match="--statistics holds no fourth moments, which this method needs"):
        compress(
            family_folder("llama"),
            tmp_path / "out",
            recipe=Recipe(rules=(own_rule(),)),
            statistics=tmp_path / "statistics",
            data=None,
        )


def test_a_curvature_of_no_known_statistic_is_refused(family_folder: FolderOf, tmp_path: Path) -> None:
    CURVATURES.register("wrong", CurvatureKind("wrong", frozenset({"inputs", "sixth moments"}), build))
    try:
        rule = own_rule("wrong")
        with pytest.raises(OptionError, match="there is no statistic 'sixth moments'"):
            compress(family_folder("llama"), tmp_path / "out", recipe=Recipe(rules=(rule,)), data=IDS)
    finally:
        del CURVATURES._entries["wrong"]
