"""One ranking of all singular directions: its losses, order and sizes, and what is cut from it."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hesse
from helpers import CommandLine, dense_tensors, left_over, write_ids
from hesse.curvature import Kronecker
from hesse.errors import CheckpointError, OptionError
from hesse.planning.problem import Problem
from hesse.planning.singular_directions import directions
from hesse.planning.slope import by_common_slope
from hesse.solvers import WhitenedSVD

FolderOf = Callable[[str], Path]


def factor(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T + 0.1 * torch.eye(size).double()


def test_half_the_squares_left_out_are_the_quadratic() -> None:
    curvature = Kronecker(output_factor=factor(5, 1), input_factor=factor(7, 2))
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)).double()
    solver = WhitenedSVD()
    state = solver.init(curvature)
    group = directions("layer", weight.shape, solver.values(state, weight), 2)
    assert [candidate.label for candidate in group.candidates] == ["1", "2", "dense"]
    for rank, candidate in enumerate(group.candidates[:-1], 1):
        change = solver.compute(state, weight, hesse.LowRank(rank))
        left = weight - change.left.double() @ change.right.double()
        assert candidate.loss == pytest.approx(0.5 * float((left * curvature.matvec(left)).sum()), rel=1e-4)
        assert candidate.size == 2 * 12 * rank


def test_models_are_nested_and_those_on_the_hull_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [torch.Size(shape) for shape in ((6, 6), (4, 9), (8, 5))]
    groups = tuple(
        directions(str(i), shape, torch.rand(min(shape), generator=generator).sort(descending=True).values, 1)
        for i, shape in enumerate(shapes)
    )
    problem = Problem(groups)
    every = list(itertools.product(*(range(len(group.candidates)) for group in groups)))
    found = [by_common_slope(problem, size) for size in range(problem.smallest, 113)]
    for size, (before, after) in zip(itertools.count(problem.smallest + 1), itertools.pairwise(found), strict=False):
        assert all(small <= large for small, large in zip(before, after, strict=True))
        assert problem.size(after) <= size
    for choice in set(found):
        best = min(problem.loss(other) for other in every if problem.size(other) <= problem.size(choice))
        assert problem.loss(choice) == pytest.approx(best)
    assert len(set(found)) > 4
    assert problem.loss(found[-1]) == 0


@pytest.fixture(scope="module")
def estimated(family_folder: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("estimated")
    source, data = family_folder("llama"), write_ids(folder / "ids.jsonl")
    hesse.estimate(source, folder / "statistics", curvatures=("gram", "kronecker"), data=data)
    return source, folder / "statistics"


def test_any_size_is_cut_from_one_run(estimated: tuple[Path, Path], tmp_path: Path) -> None:
    source, statistics = estimated
    dense, ranks, losses = dense_tensors(source), [], []
    for size in (40, 60, 80):
        out = tmp_path / str(size)
        report = hesse.compress(source, out, method="acip", size=f"{size}%", statistics=statistics).report
        config = json.loads((out / "config.json").read_text())
        names = [layer for layer in dense if layer.endswith("_proj.weight")]
        held = dense_tensors(out)
        whole = sum(dense[name].numel() for name in names)
        rank = {name: config["low_rank"].get(name.removesuffix(".weight")) for name in names}
        taken = sum(dense[n].numel() if r is None else r * sum(dense[n].shape) for n, r in rank.items())
        assert size / 100 - 0.15 < taken / whole <= size / 100
        for name, own in rank.items():
            if own is None:
                assert torch.equal(held[name], dense[name])
            else:
                assert torch.linalg.matrix_rank(held[name].double(), rtol=1e-5) == own
        ranks.append({n: min(dense[n].shape) if r is None else r for n, r in rank.items()})
        losses.append(report.loss.predicted)
    for small, large in itertools.pairwise(ranks):
        assert all(small[name] <= large[name] for name in small)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("size", ["1%", "100%", "much", "-5"])
def test_sizes_that_cannot_be_reached_are_refused(size: str, estimated: tuple[Path, Path], tmp_path: Path) -> None:
    source, statistics = estimated
    with pytest.raises(OptionError, match="--size"):
        hesse.compress(source, tmp_path / "out", method="acip", size=size, statistics=statistics)
    assert left_over(tmp_path) == []


def test_statistics_of_another_model_are_refused(
    estimated: tuple[Path, Path], family_folder: FolderOf, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is of another model"):
        hesse.compress(family_folder("qwen2"), tmp_path / "out", method="acip", size="60%", statistics=estimated[1])
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("options", [{}, {"size": "60%"}, {"statistics": "s"}, {"options": hesse.Options(rank=4)}])
def test_a_size_and_statistics_are_needed_and_no_more(
    options: dict[str, Any], estimated: tuple[Path, Path], tmp_path: Path
) -> None:
    given = {"size": "60%", "statistics": estimated[1], **options} if "options" in options else options
    with pytest.raises(OptionError, match="the method acip takes a size of the linear layers and statistics"):
        hesse.compress(estimated[0], tmp_path / "out", method="acip", **given)


def test_the_command_line(estimated: tuple[Path, Path], hesse_command: CommandLine, tmp_path: Path) -> None:
    arguments = ("compress", estimated[0], tmp_path / "out", "--method", "acip")
    report = json.loads(hesse_command(*arguments, "--size", "60%", "--statistics", estimated[1], "--json").stdout)
    assert report["recipe"]["method"] == "acip"
    refused = hesse_command(*arguments, "--overwrite")
    assert refused.code == 2
    assert "hesse compress MODEL OUT --method acip --size 60% --statistics STATISTICS" in " ".join(
        refused.stderr.split()
    )
