"""A fast share of the zoo: small model types of each kind, and that the verdicts can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
TYPES = ("llama", "gpt2", "gemma2", "gpt_neox", "opt", "mixtral")
sys.path.insert(0, str(BENCH))

import zoo  # noqa: E402
import zoo_cell  # noqa: E402

GOOD = {
    "keys": {"missing": [], "unexpected": [], "mismatched": [], "error_msgs": []},
    "decoding_error": 0.005,
    "worst_weight": "model.layers.0.mlp.down_proj.weight",
    "difference": 1e-6,
    "dense_loss": 5.0,
    "hesse_dense_loss": 5.0,
    "compressed_loss": 5.1,
    "hesse_compressed_loss": 5.1,
    "left_dense": [],
    "dense_share": 0.0,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of the types, run in a process that has not Hesse, as the zoo is."""
    file = tmp_path_factory.mktemp("zoo") / "zoo.json"
    chosen = [f"causal/{name}" for name in TYPES]
    code = f"import zoo, pathlib; zoo.run({chosen}, pathlib.Path({str(file)!r}), workers=2, seconds=120)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(BENCH), str(BENCH.parent / "src")))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    cells: dict[str, Any] = json.loads(file.read_text())["cells"]
    return cells


@pytest.mark.parametrize("name", TYPES)
def test_a_type_works_in_plain_transformers(results: dict[str, Any], name: str) -> None:
    found = results[f"causal/{name}"]
    assert found["verdict"] == zoo_cell.WORKS, found["detail"]
    assert found["difference_from_dense"] > 0  # it was compressed


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, zoo_cell.WORKS),
        ({"keys": {**GOOD["keys"], "missing": ["lm_head.weight"]}}, zoo_cell.LOADS_NOT),
        ({"decoding_error": 0.5}, zoo_cell.WRONG),
        ({"difference": 0.002}, zoo_cell.WRONG),
        ({"difference": float("nan")}, zoo_cell.WRONG),
        ({"hesse_dense_loss": 5.01}, zoo_cell.WRONG),
        ({"evaluate_error": "KeyError"}, zoo_cell.WRONG),
        ({"left_dense": [("model.layers.0.mlp.gate.weight", False)], "dense_share": 0.01}, zoo_cell.DENSE_SILENT),
        ({"left_dense": [("model.layers.0.mlp.gate.weight", True)], "dense_share": 0.01}, zoo_cell.WORKS),
        ({"left_dense": [("model.layers.0.mlp.gate.weight", True)], "dense_share": 0.5}, zoo_cell.DENSE_TOLD),
    ],
)
def test_each_fault_has_its_verdict(change: dict[str, Any], verdict: str) -> None:
    assert zoo_cell.judge({**GOOD, **change})[0] == verdict


def test_a_weight_is_listed_by_its_name_or_by_a_pattern_with_any_numbers() -> None:
    text = zoo_cell._listed_text({"notes": ["left dense: model.layers.0-3.mlp.gate, a router"], "layers": ["lm.x"]})
    assert zoo_cell._pattern("model.layers.2.mlp.gate.weight") in text
    assert zoo_cell._pattern("lm.x.weight") not in text


def test_the_table_counts_what_was_built() -> None:
    cells = {
        "causal/llama": {"verdict": zoo_cell.WORKS, "detail": ""},
        "causal/odd": {"verdict": zoo_cell.UNBUILT, "detail": "ValueError: x"},
        "base/bert": {"verdict": zoo_cell.WRONG, "detail": "outputs differ"},
    }
    lines = zoo.table({"cells": cells}).splitlines()
    assert lines[2].startswith("| causal | 1 | 1 | 0 |")
    assert "- `base/bert`: outputs differ" in lines
    assert "- `causal/odd`: ValueError: x" in lines
