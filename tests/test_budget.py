"""One budget for a whole model: what is planned is kept to, loads, and can be read and edited."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hesse
import tiny_models
from helpers import IDS, CommandLine, compress, fast_first, left_over, output, twin, write_ids
from hesse.errors import OptionError, UnsupportedProduct
from hesse.formats import open_checkpoint
from hesse.methods import Recipe, Rule, load_recipe
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import GridOptions, SparseOptions
from hesse.methods.solver_options import SolverOptions
from hesse.networks.families import READ_AS_ONE
from hesse.planning.budget import Budget

FolderOf = Callable[[str], Path]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("40%", 400), ("12.5 %", 125), ("5MB", 5_000_000), ("2KiB", 2048), ("300", 300), (300, 300), ("1.5kB", 1500)],
)
def test_sizes_are_shares_or_bytes(text: str | int, expected: int) -> None:
    assert Budget(size=text).bytes_of(1000) == expected


@pytest.mark.parametrize("text", ["", "40 percent", "-3MB", "0%", "5XB", "%"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--size is"):
        Budget(size=text)


def test_there_is_one_budget() -> None:
    for values in ({}, {"size": "40%", "loss": 0.1}, {"bits": 3.0, "loss": 0.1}):
        with pytest.raises(OptionError, match="one budget"):
            Budget(**values)  # type: ignore[arg-type]
    for values in ({"bits": 0.0}, {"loss": -1.0}, {"loss": float("nan")}, {"loss": float("inf")}):
        with pytest.raises(OptionError, match="a number above 0"):
            Budget(**values)


@pytest.mark.parametrize("size", ["65%", "75%"])
def test_a_size_is_kept_to_and_nearly_used(size: str, half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    report = compress(source, out, size=size)
    wanted = Budget(size=size).bytes_of(report.bytes_before)
    assert 0.97 * wanted < report.bytes_after <= wanted
    dense = tiny_models.load("llama", twin(out, tmp_path / "twin", source))
    assert torch.equal(output(tiny_models.load("llama", out)), output(dense))


def test_the_plan_is_at_least_as_good_as_any_uniform_recipe(half_folder: FolderOf) -> None:
    plan = hesse.plan(half_folder("llama"), mean_bits=3.6, data=IDS).report
    assert plan.bits_per_weight <= 3.6
    (chosen,) = [point for point in plan.front if point["kind"] == "chosen"]
    assert (chosen["bytes"], chosen["predicted"]) == (plan.bytes_after, plan.loss.predicted)
    uniform = [point for point in plan.front if point["kind"] == "uniform"]
    # 64 columns do not divide a width of 96, so that groups of 64 are stored as groups of 32 there, and offered once.
    assert [point["label"] for point in uniform] == [f"{bits} bits, groups of 32" for bits in (2, 3, 4, 5, 6, 8)]
    within = [point for point in uniform if point["bytes"] <= plan.bytes_after]
    assert within
    assert all(plan.loss.predicted <= point["predicted"] * 1.001 for point in within)
    losses = [point["predicted"] for point in uniform]  # above 4 bits foretold from 4
    assert losses == sorted(losses, reverse=True)


def test_a_loss_is_kept_to_with_the_fewest_bytes(half_folder: FolderOf) -> None:
    model = half_folder("llama")
    tight, loose = (hesse.plan(model, loss=loss, data=IDS).report for loss in (0.01, 0.1))
    assert tight.loss.predicted <= 0.01
    assert loose.loss.predicted <= 0.1
    assert loose.bytes_after < tight.bytes_after
    again = hesse.plan(model, size=tight.bytes_after, data=IDS).report
    assert again.loss.predicted <= tight.loss.predicted * 1.001


@pytest.mark.parametrize("name", fast_first(["phi3", "mixtral", "gpt2", "llama", "qwen2", "bert"], 3))
def test_what_loaders_fuse_gets_one_scheme(name: str, family_folder: FolderOf, tmp_path: Path) -> None:
    source, out = family_folder(name), tmp_path / "out"
    report = compress(source, out, mean_bits=5.5)
    assert report.bits_per_weight <= 5.5
    schemes: dict[str, set[str]] = {}
    recipe = Recipe.model_validate(report.recipe)
    for layer in report.layers:
        parent, _, leaf = layer.name.rpartition(".")
        part = (
            "experts"
            if ".experts." in parent
            else "+".join(next((f for f in READ_AS_ONE if leaf in f), (leaf,))) + parent
        )
        schemes.setdefault("all" if name == "gpt2" else part, set()).add(str(recipe.rule_for(layer.name)))
    assert all(len(rules) == 1 for rules in schemes.values())
    dense = tiny_models.load(name, twin(out, tmp_path / "twin", source))
    torch.testing.assert_close(output(tiny_models.load(name, out)), output(dense))


def test_the_recipe_is_written_and_can_be_run_again(
    half_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path
) -> None:
    model, data = half_folder("llama"), ("--data", write_ids(tmp_path / "ids.jsonl"))
    assert hesse_command("compress", model, tmp_path / "a", "--bits", "3.4", *data).code == 0
    written = tmp_path / "a" / "recipe.yaml"
    recipe = load_recipe(written)
    assert "3.4" in str(recipe.about) or "bits per planned weight" in str(recipe.about)
    assert hesse_command("compress", model, tmp_path / "b", "--recipe", written, *data).code == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("a", "b")]
    assert weights[0] == weights[1]
    report = json.loads((tmp_path / "a" / "hesse-report.json").read_text(encoding="utf-8"))
    assert report["front"]
    assert report["seconds"]["plan"] > 0
    assert json.loads((tmp_path / "b" / "hesse-report.json").read_text(encoding="utf-8"))["front"] is None
    printed = hesse_command("compress", model, "--bits", "3.4", *data, "--print-recipe")
    assert (printed.code, printed.stdout) == (0, written.read_text(encoding="utf-8"))


def test_a_plan_from_statistics(half_folder: FolderOf, tmp_path: Path) -> None:
    model, data = half_folder("llama"), write_ids(tmp_path / "ids.jsonl")
    for kinds in (("gram",), ("gram", "kronecker")):
        folder = tmp_path / "+".join(kinds)
        hesse.estimate(model, folder, data=data, curvatures=kinds)
        plan = hesse.plan(model, mean_bits=3.6, statistics=folder).report
        assert plan.bits_per_weight <= 3.6
        assert 0 < plan.loss.predicted < 1


def test_options_hold_for_all_layers(half_folder: FolderOf) -> None:
    model = half_folder("llama")
    plan = hesse.plan(
        model, mean_bits=4.0, data=IDS, method="gptq", options=hesse.Options(group_size=32, sparsity="2:4")
    ).report
    for rule in plan.recipe.rules:
        assert rule.constraint.grid is not None
        assert rule.constraint.grid.group_size == 32
        assert rule.constraint.sparse is not None
        assert rule.constraint.sparse.amount == "2:4"


def test_zeros_save_no_bytes_and_are_not_chosen(half_folder: FolderOf) -> None:
    """Pruned layers are stored dense: a plan that could choose them does not, for any size."""
    plan = hesse.plan(half_folder("llama"), mean_bits=6.0, data=IDS, target="any").report
    assert all(rule.constraint.sparse is None for rule in plan.recipe.rules)


def test_ranks_are_on_offer_where_model_code_may_travel(half_folder: FolderOf, tmp_path: Path) -> None:
    model = half_folder("llama")
    plan = hesse.plan(model, mean_bits=8.0, data=IDS, method="activation-svd", target="any").report
    assert all(rule.constraint.low_rank is not None for rule in plan.recipe.rules)
    with pytest.raises(OptionError, match=r"transformers does not support rank .*--target any"):
        hesse.plan(model, mean_bits=8.0, data=IDS, method="activation-svd", ignore=(), target="transformers")


def test_ignored_layers_are_not_planned(half_folder: FolderOf) -> None:
    plan = hesse.plan(half_folder("llama"), mean_bits=3.6, data=IDS, ignore=("down_proj",)).report
    assert plan.recipe.rule_for("model.layers.0.mlp.down_proj") is None
    assert plan.recipe.rule_for("model.layers.0.mlp.up_proj") is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--size", "1%"), "the smallest size is"),
        (("--bits", "1.5"), "the smallest mean is"),
        (("--loss", "0"), "--loss is 0"),
        (("--size", "big"), "--size is 'big'"),
        (("--size", "200%"), "within this budget already"),
        (("--bits", "3.2", "--loss", "0.1"), "one budget"),
        (("--bits", "4", "--size", "50%"), "a budget chooses the bits"),
        (("--bits", "three"), "--bits is 'three'"),
        (("--size", "50%", "--format", "dense"), "no budget can be shared out: --format dense"),
        (("--size", "50%", "--target", "onnx"), "there is no target 'onnx'"),
        (("--size", "50%", "--target", "vllm", "--group-size", "48"), "vllm does not support"),
        (("--size", "50%", "--ignore", "*"), "no layer is left"),
        (("--size", "50%", "--ignore", "nothing"), "the pattern 'nothing' matches no layer"),
        (("--bits", "4", "--group-size", "48", "--target", "vllm"), "vllm does not support"),
    ],
)
def test_what_cannot_be_planned_is_said(
    options: tuple[str, ...], named: str, half_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path
) -> None:
    data = ("--data", write_ids(tmp_path / "ids.jsonl"))
    ran = hesse_command("compress", half_folder("llama"), tmp_path / "out", *options, *data)
    errors = [line for line in ran.stderr.splitlines() if line.startswith("Error: ")]
    assert ran.code == 2
    assert len(errors) == 1
    assert named in errors[0]
    assert left_over(tmp_path) == []


def test_the_smallest_size_that_is_said_can_be_reached(half_folder: FolderOf) -> None:
    model = half_folder("llama")
    with pytest.raises(OptionError, match="the smallest mean is") as refused:
        hesse.plan(model, mean_bits=1.0, data=IDS)
    smallest = float(str(refused.value).split("smallest mean is ")[1].split(" ")[0])
    assert hesse.plan(model, mean_bits=smallest, data=IDS).report.bits_per_weight <= smallest


def test_a_recipe_and_a_budget_exclude_each_other(hesse_command: CommandLine, tmp_path: Path) -> None:
    ran = hesse_command("compress", "MODEL", "OUT", "--recipe", tmp_path / "recipe.yaml", "--size", "40%")
    assert (ran.code, "--recipe says everything" in ran.error) == (2, True)


def rule(curvature: str, solver: str, constraint: ConstraintOptions, layers: tuple[str, ...] = ("*",)) -> Rule:
    return Rule(layers=layers, curvature=curvature, constraint=constraint, solver=SolverOptions(name=solver))  # type: ignore[arg-type]


def test_vllm_needs_one_rule_for_what_it_fuses(half_folder: FolderOf, tmp_path: Path) -> None:
    grids = [ConstraintOptions(grid=GridOptions(bits=bits, group_size=32)) for bits in (4, 8)]
    rules = (rule("gram", "error_feedback", grids[1], ("q_proj",)), rule("gram", "error_feedback", grids[0]))
    with pytest.raises(OptionError, match=r"q_proj and .*k_proj: vllm fuses them"):
        compress(half_folder("llama"), tmp_path / "out", recipe=Recipe(rules=rules), target="vllm")


@pytest.mark.parametrize(
    ("curvature", "solver", "constraint", "usable"),
    [
        ("gram_diagonal", "error_feedback", ConstraintOptions(grid=GridOptions()), "use curvature gram"),
        ("gram_diagonal", "admm", ConstraintOptions(sparse=SparseOptions()), "use curvature gram or"),
        ("gram", "nearest", ConstraintOptions(grid=GridOptions()), "use curvature identity or gram_diagonal"),
        ("gram", "whitened_svd", ConstraintOptions(grid=GridOptions()), "no curvature"),
    ],
)
def test_a_rule_whose_curvature_lacks_a_product_names_one_that_has_it(
    curvature: str, solver: str, constraint: ConstraintOptions, usable: str, half_folder: FolderOf, tmp_path: Path
) -> None:
    wrong = rule(curvature, solver, constraint, ("*.mlp.*",))
    good = rule("gram", "error_feedback", ConstraintOptions(grid=GridOptions(group_size=32)))
    with pytest.raises(UnsupportedProduct, match=r"the rule for \*\.mlp\.\*") as refused:
        compress(half_folder("llama"), tmp_path / "out", recipe=Recipe(rules=(wrong, good)))
    assert usable in str(refused.value)
    assert left_over(tmp_path) == []


def test_a_planned_checkpoint_is_what_its_size_says(half_folder: FolderOf, tmp_path: Path) -> None:
    plan = hesse.plan(half_folder("llama"), size="70%", data=IDS).report
    out = tmp_path / "out"
    compress(half_folder("llama"), out, recipe=plan.recipe)
    assert 0.97 * plan.bytes_after < open_checkpoint(out).file_bytes <= plan.bytes_after
