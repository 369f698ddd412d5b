"""Every row of the table runs from its entry, and what is built is what the row prints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import digits
import hesse
from helpers import IDS, write_ids
from hesse import solvers
from hesse.constraints import (
    BlockTable,
    Codebook,
    EitherSide,
    Grid,
    LowRank,
    Microscaled,
    MixedGrid,
    Plus,
    Rotated,
    SalientColumns,
    ScaledColumns,
    SignRankOne,
    Sparse,
    Table,
    VectorCodebook,
)
from hesse.curvature import BlockRankOneSum, CrossEntropy, Diagonal, GaussNewton, Gram, Identity, Kronecker, RankOneSum
from hesse.methods import METHODS, Method
from hesse.methods.strategies import STRATEGIES
from hesse.planning import TilePlan, grid_menu, price
from hesse.planning.planners import PLANNERS
from hesse.scores import SCORES
from hesse.training import CompressionAware, HeldCodes, HeldZeros, Movement, OneBit, StraightThrough, Training

CURVATURES: dict[str, type] = {
    "identity": Identity,
    "gram_diagonal": Diagonal,
    "gram": Gram,
    "weighted_gram": Gram,
    "fisher_diagonal": Diagonal,
    "fisher_rows_columns": Kronecker,
    "fisher_columns": Kronecker,
    "fisher_blocks": BlockRankOneSum,
    "fisher_gradients": RankOneSum,
    "kronecker": Kronecker,
    "attention": Kronecker,
}
CONSTRAINTS: dict[str, type] = {
    "grid": Grid,
    "codebook": Codebook,
    "vector_codebook": VectorCodebook,
    "table": Table,
    "block_table": BlockTable,
    "microscaled": Microscaled,
    "sparse": Sparse,
    "low_rank": LowRank,
    "outliers": Sparse,
    "sign_rank_one": SignRankOne,
    "salient": SalientColumns,
}
BASES: dict[str, type] = {"scaled": ScaledColumns, "rotated": Rotated, "either-side": EitherSide, "mixed": MixedGrid}
SOLVERS: dict[str, type] = {
    "nearest": solvers.Nearest,
    "error_feedback": solvers.ErrorFeedback,
    "two_sided_feedback": solvers.TwoSidedFeedback,
    "greedy_surgeon": solvers.GreedySurgeon,
    "surgeon_at_once": solvers.SummedSurgeon,
    "surgeon_in_steps": solvers.StepwiseSurgeon,
    "admm": solvers.ADMM,
    "whitened_svd": solvers.WhitenedSVD,
    "activation_aware": solvers.ActivationAware,
    "incoherent": solvers.Incoherent,
    "cheaper_side": solvers.CheaperSide,
    "cheaper_plain_side": solvers.CheaperSide,
    "refit_salient": solvers.RefitSalient,
    "salient_bits": solvers.SalientBits,
    "vector_feedback": solvers.VectorFeedback,
    "learned_rounding": solvers.LearnedRounding,
    "learned_two_sided": solvers.LearnedRounding,
    "rows_and_columns": solvers.RowsAndColumns,
    "repair": solvers.Repair,
    "plain_repair": solvers.Repair,
    "alternating": solvers.Alternating,
    "plain_alternating": solvers.Alternating,
}
TRAININGS: dict[str, type] = {
    "held_zeros": HeldZeros,
    "held_codes": HeldCodes,
    "straight_through": StraightThrough,
    "movement_scores": Movement,
    "signs_and_vectors": OneBit,
}
# What fits the narrow layers of tiny networks.
NARROW: dict[str, dict[str, Any]] = {
    "grid": {"group_size": 16},
    "low_rank": {"rank": 2},
    "table": {"group_size": 16},
    "vector_codebook": {"vector_length": 2},
    "codebook": {"bits": 2},
}


# Modules whose names are those of their functions, too.
FINETUNE, PRUNE = import_module("hesse.training.finetune"), import_module("hesse.modules.prune")
LAYER_SOLVER = import_module("hesse.layerwise.layer_solver")
FolderOf = Callable[[str], Path]


def rows_of(*verbs: str) -> list[str]:
    return [name for name, method in METHODS.items() if method.verb in verbs]


def narrow_options(method: Method) -> hesse.Options:
    given = [NARROW[part] for part in method.constraints if part in NARROW]
    return hesse.Options(**{key: value for options in given for key, value in options.items()})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))


@dataclass
class Built:
    """What solved the layers of a run."""

    curvatures: set[type] = field(default_factory=set)
    constraints: list[Any] = field(default_factory=list)
    solvers: set[type] = field(default_factory=set)


@contextmanager
def recording() -> Iterator[Built]:
    """Note what each layer is solved with, and solve it."""
    built, module = Built(), LAYER_SOLVER
    solve_with = module.solve_with

    def noting(weight: Any, curvature: Any, constraint: Any, solver: Any, *others: Any) -> Any:
        built.curvatures.add(type(curvature))
        built.constraints.append(constraint)
        built.solvers.add(type(solver))
        return solve_with(weight, curvature, constraint, solver, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "solve_with", noting)
        yield built


def check_built(method: Method, built: Built) -> None:
    """The layers were solved with what the row prints."""
    curvature, constraint, solver = method.triple
    assert method.curvature is not None
    assert curvature.startswith(method.curvature)
    assert built.curvatures == {CURVATURES[method.curvature]}
    assert built.solvers == {SOLVERS[method.solver]}
    assert solver.startswith(method.solver)
    assert built.constraints
    for found in built.constraints:
        if method.basis != "own":
            assert constraint.startswith(method.basis)
            assert type(found) is BASES[method.basis]
            found = found.base
        parts = [found.base, found.correction] if isinstance(found, Plus) else [found]
        assert [type(part) for part in parts] == [CONSTRAINTS[part] for part in method.constraints]


ON_DISK = [
    name
    for name in rows_of("compress")
    if METHODS[name].rewrite is not None
    or METHODS[name].curvature in ("attention", "weighted_gram")
    or METHODS[name].defaults.input_bits is not None
]


@pytest.mark.parametrize("name", [name for name in rows_of("compress") if name not in ON_DISK])
def test_rows_of_compress_build_what_they_print(name: str) -> None:
    with recording() as built:
        METHODS[name].run(net(), data=digits.batches(samples=64), options=narrow_options(METHODS[name]))
    check_built(METHODS[name], built)


@pytest.mark.parametrize("name", ON_DISK)
def test_rows_of_compress_on_a_checkpoint_build_what_they_print(
    name: str, half_folder: FolderOf, tmp_path: Path
) -> None:
    method = METHODS[name]
    with recording() as built:
        options = hesse.Options(group_size=None if method.defaults.input_bits else 32)
        result = method.run(half_folder("llama"), tmp_path / "out", options=options, data=IDS[:2])
    assert result.report.recipe.get("rewrite") == method.rewrite
    inside = {"attention": {Kronecker}}.get(method.curvature or "", {CURVATURES[method.curvature or ""]})
    assert built.curvatures == inside
    assert built.solvers == {SOLVERS[method.solver]}
    assert {type(constraint) for constraint in built.constraints} == {CONSTRAINTS[part] for part in method.constraints}


@pytest.mark.parametrize("name", rows_of("prune_gradually"))
def test_rows_of_gradual_pruning_build_what_they_print(name: str) -> None:
    method, data = METHODS[name], digits.batches(samples=64)
    with recording() as built:
        result = method.run(net(), data, Training(steps=4), 0.5, loss_function=CrossEntropy(), cuts=2, calibration=1)
    check_built(method, built)
    assert [cut.sparsity for cut in result.report.cuts] == [0.35, 0.5]


@pytest.mark.parametrize("name", rows_of("finetune"))
def test_rows_of_finetuning_build_what_they_print(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, model = METHODS[name], net()
    with torch.no_grad():
        model[1].weight.mul_(Sparse(0.5).mask(model[1].weight.square()))
    loops: list[Any] = []
    loop = FINETUNE.TrainingLoop
    monkeypatch.setattr(FINETUNE, "TrainingLoop", lambda *given: loops.append(loop(*given)) or loops[-1])
    options = hesse.Options(own={"cuts": 2}) if name == "movement" else narrow_options(method)
    options = hesse.Options() if name == "onebit-training" else options
    method.run(model, digits.batches(samples=64), Training(steps=4), loss_function=CrossEntropy(), options=options)
    (made,) = loops
    if method.solver == "compression_aware":
        assert isinstance(made.rule, CompressionAware)
        assert made.rule.patterns == (Sparse(0.5), Sparse(0.7), Sparse(0.9))
        assert not made.held
        return
    assert {type(held) for held in made.held.values()} == {TRAININGS[method.solver]}
    assert set(made.held) == ({"1.weight"} if method.solver == "held_zeros" else {"1.weight", "3.weight"})
    if isinstance(made.held["1.weight"], Movement | StraightThrough):
        held = made.held["1.weight"]
        constraint = held.pattern if isinstance(held, Movement) else held.constraint
        assert [type(constraint)] == [CONSTRAINTS[part] for part in method.constraints]


@pytest.mark.parametrize("name", rows_of("prune"))
def test_rows_of_pruning_build_what_they_print(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, strategies = METHODS[name], []
    build = PRUNE.build_strategy
    monkeypatch.setattr(PRUNE, "build_strategy", lambda *given: strategies.append(build(*given)) or strategies[-1])
    options: dict[str, Any] = {"attack": hesse.scores.Attack(0.1)} if name == "mad" else {}
    options |= {"loss": 0.5} if name in ("pagcp-groups", "axformer") else {}
    options |= {"steps": 60, "rate": 0.2, "penalty": 0.05} if name == "only-train-once" else {}
    if method.partition == "head-dimensions":
        model: nn.Module = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Flatten())
        model.append(nn.Linear(64, 10))
        data = [(torch.randn(16, 8, 8), torch.randint(10, (16,)))]
        options["keep"] = 0.5
    else:
        model, data = net(), digits.batches(samples=64)
    method.run(model, data=data, what=method.partition, **options)
    (strategy,) = strategies
    table = PRUNE.STRATEGIES
    assert type(strategy) is table[method.solver]
    if method.score is not None:
        assert strategy.score in (method.score, SCORES[method.score])
        assert SCORES[method.score].uses == method.curvature
        assert method.score in method.triple[0]


@pytest.mark.parametrize("name", [*rows_of("price"), *rows_of("allocate")])
def test_rows_of_allocation_plan_as_they_print(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, names = METHODS[name], ("1.weight", "3.weight")
    objective = hesse.Objective.of(net(), CrossEntropy(), digits.batches(samples=64), names)
    menu = grid_menu(objective, (8, 4))
    made: list[Any] = []
    build = GaussNewton.__init__
    monkeypatch.setattr(GaussNewton, "__init__", lambda self, **given: made.append(self) or build(self, **given))
    pricing = price(objective, menu, name)
    assert "gauss_newton" in method.curvatures
    assert made
    assert pricing.planner is PLANNERS[method.solver]
    assert bool(pricing.blocks != [[0], [1]] or method.partition == "weights" or name == "q-vlm")
    everything = sum(own[0].size for own in menu.values())
    choice = pricing.choose((lambda choice: True) if method.solver == "bisection" else everything)
    assert choice == ((1, 1) if method.solver == "bisection" else (0, 0))


@pytest.mark.parametrize("name", rows_of("allocate"))
def test_rows_of_allocation_run_on_a_checkpoint(name: str, half_folder: FolderOf, tmp_path: Path) -> None:
    result = METHODS[name].run(half_folder("llama"), tmp_path / "out", size="80%", method="rtn", data=IDS[:2])
    assert result.report.recipe["about"].startswith("planned")


@pytest.mark.parametrize("name", rows_of("plan_tiles"))
def test_rows_of_tiles_plan_as_they_print(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planner, called = PLANNERS[METHODS[name].solver], []
    monkeypatch.setitem(PLANNERS._entries, METHODS[name].solver, lambda *given: called.append(given) or planner(*given))
    objective = hesse.Objective.of(net(), CrossEntropy(), digits.batches(samples=64), ("1.weight",))
    assert isinstance(METHODS[name].run(objective, 0.5), TilePlan)
    assert called


@pytest.mark.parametrize("name", rows_of("repair"))
def test_rows_of_repair_build_what_they_print(name: str, family_folder: FolderOf, tmp_path: Path) -> None:
    source = family_folder("llama")
    hesse.compress(
        source, tmp_path / "rounded", method="rtn", options=hesse.Options(bits=3, group_size=32), data=IDS[:2]
    )
    for curvature in METHODS[name].curvatures:
        with recording() as built:
            METHODS[name].run(
                source, tmp_path / "rounded", tmp_path / curvature, curvature=curvature, rank=2, data=IDS[:2]
            )
        assert built.curvatures == {CURVATURES[curvature]}
        assert built.solvers == {SOLVERS[METHODS[name].solver]}
        assert {type(constraint) for constraint in built.constraints} == {LowRank}


def test_every_name_of_a_row_is_in_its_table() -> None:
    for method in METHODS.values():
        method.check()
        assert method.score is None or method.score in SCORES
        for option in method.options():
            assert option.help.endswith(".")


@pytest.mark.parametrize("name", rows_of("prune_checkpoint"))
def test_rows_that_prune_a_checkpoint_build_what_they_print(name: str, half_folder: FolderOf, tmp_path: Path) -> None:
    method, strategy = METHODS[name], STRATEGIES[METHODS[name].solver]
    options = {"rank": 2} if name == "flexigpt" else {}
    report = method.run(half_folder("llama"), tmp_path / "out", keep=0.5, data=IDS[:2], **options).report
    assert report.what == method.partition
    assert report.method in (name, method.score)
    assert {option.name for option in method.options()} <= {field.name for field in fields(strategy)}
    assert method.score is None or report.score == method.score


@pytest.mark.parametrize("name", rows_of("compress_to_size"))
def test_rows_of_sizes_build_what_they_print(name: str, family_folder: FolderOf, tmp_path: Path) -> None:
    source, data = family_folder("llama"), write_ids(tmp_path / "ids.jsonl")
    hesse.estimate(source, tmp_path / "statistics", curvatures=("gram", "kronecker"), data=data)
    with recording() as built:
        METHODS[name].run(source, tmp_path / "out", statistics=tmp_path / "statistics", size="60%", data=data)
    check_built(METHODS[name], built)


def test_every_row_is_run_by_one_of_these_tests() -> None:
    here = ("compress", "prune_gradually", "finetune", "prune", "price", "allocate", "plan_tiles", "repair")
    assert set(rows_of(*here, "prune_checkpoint", "compress_to_size")) == set(METHODS)
    assert len(METHODS) >= 77
