"""Methods of other packages: registered in one decorated function or one entry, they are rows like any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hesse
from helpers import compress_module
from hesse.errors import OptionError
from hesse.methods import METHODS, Method, Options, find_method, register, solver
from hesse.registry import Registry

# A package with one module: a solver, a constraint, a curvature and two methods of its own.
MODULE = '''
"""Rounding a share of the way, on a coarse grid, under squared second moments of the inputs."""

from typing import Annotated, ClassVar

import torch

from hesse.constraints import Grid
from hesse.curvature import Diagonal
from hesse.methods import CURVATURES, ConstraintPart, CurvatureKind, Method, Options, constraint, register, solver


@solver("halfway", damped=False)
def halfway(weight, curvature, constraint, *, share: Annotated[float, "Share of the way to the grid."] = 0.5):
    nearest = constraint.nearest(weight)
    return weight + share * (nearest - weight)


@constraint("coarse")
class CoarseOptions(ConstraintPart):
    takes: ClassVar[dict[str, str]] = {"width": "width", "group_size": "group_size"}
    width: int = 2
    group_size: int = 32

    def build(self):
        return Grid(self.width, self.group_size)


CURVATURES.register(
    "squares",
    CurvatureKind("squares", frozenset({"inputs"}), lambda known, *_: Diagonal(values=known.gram.diagonal().square())),
)
register(
    Method("half", "identity", ("grid",), "halfway", "ours", "no data", defaults=Options(bits=4, group_size=32)),
    Method("coarse-half", "squares", ("coarse",), "halfway", "ours", "calibration text"),
    family="extra",
)
'''


def write_package(folder: Path, name: str, module: str) -> None:
    """Write a package as an installer leaves it: a module, and metadata with an entry point."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(module, encoding="utf-8")
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[hesse.methods]\nrows = {name}\n", encoding="utf-8")


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line where the packages of a folder are installed."""
    paths = [str(folder), str(Path(hesse.__file__).parent.parent)]
    return subprocess.run(
        [sys.executable, "-m", "hesse", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_methods_of_an_installed_package_are_rows_and_run_from_the_command_line(tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_package(site, "hesse_extra", MODULE)
    listed = run(site, "methods", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {row["method"]: row for row in json.loads(listed.stdout)}
    assert set(METHODS) < set(rows)
    assert rows["half"]["family"] == "extra"
    assert rows["half"]["solver"] == "halfway"
    (share,) = (option for option in rows["half"]["options"] if option["name"] == "share")
    assert share == {"name": "share", "type": "float", "default": 0.5, "help": "Share of the way to the grid."}
    shown = run(site, "methods", "coarse-half")
    assert "squares × coarse × halfway" in shown.stdout
    assert "options of coarse-half" in shown.stdout
    chosen = ("--method", "coarse-half", "--group-size", 16, "--set", "share=0.25", "--set", "width=3")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(run(site, "compress", "MODEL", *chosen, "--print-recipe").stdout)
    for text in ("curvature: squares", "coarse:", "width: 3", "group_size: 16", "name: halfway", "share: 0.25"):
        assert text in recipe.read_text()
    out = tmp_path / "out"
    common = ("--samples", "2", "--length", "32", "--format", "dense", "--json")
    made = run(site, "compress", "default", out, "--recipe", recipe, *common)
    assert made.returncode == 0, made.stderr
    assert (out / "config.json").is_file()
    refused = run(site, "compress", "MODEL", "--method", "rtn", "--set", "share=0.25", "--print-recipe")
    assert refused.returncode == 2
    assert "--share has no meaning for the method rtn" in refused.stderr


def test_a_package_that_fails_is_named_in_one_line_and_the_others_are_there(tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_package(site, "hesse_broken", "import no_such_module\n")
    write_package(site, "hesse_exits", "import sys\nsys.exit(3)\n")
    write_package(site, "hesse_lines", "raise ValueError('one\\ntwo')\n")
    write_package(site, "hesse_extra", MODULE)
    again = "from hesse.methods import METHODS, register\nregister(METHODS['gptq'])\n"
    write_package(site, "hesse_twice", again)
    listed = run(site, "methods")
    assert listed.returncode == 0
    assert "half" in listed.stdout
    assert sorted(line for line in listed.stderr.splitlines() if line) == [
        "the package hesse_broken could not add its methods: ModuleNotFoundError: No module named 'no_such_module'",
        "the package hesse_exits could not add its methods: SystemExit: 3",
        "the package hesse_lines could not add its methods: ValueError: one two",
        "the package hesse_twice could not add its methods: OptionError: there is already a method 'gptq': "
        "choose another name",
    ]


def test_a_method_is_registered_and_runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (METHODS, hesse.methods.SOLVERS):
        monkeypatch.setattr(table, "_entries", dict(table))

    @solver("to_zero", damped=False)
    def to_zero(weight: torch.Tensor, curvature: object, constraint: hesse.constraints.Constraint) -> torch.Tensor:
        return torch.zeros_like(weight)

    register(Method("zero", "gram", ("grid",), "to_zero", "this test", "data", defaults=Options(bits=4, group_size=-1)))
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    data = [(torch.randn(8, 4), torch.randn(8, 3))]
    report = compress_module(model, data, method="zero", loss_function=hesse.curvature.SquaredError())
    assert not bool(report.module[0].weight.any())
    assert METHODS["zero"].family == "own"
    with pytest.raises(OptionError, match="there is already a method 'zero'"):
        register(Method("zero", "gram", ("grid",), "to_zero", "this test", "data"))
    with pytest.raises(OptionError, match="there is no solver 'to_one'"):
        register(Method("one", "gram", ("grid",), "to_one", "this test", "data"))
    with pytest.raises(OptionError, match="the method gmp does not run by compress: it runs by hesse"):
        find_method("gmp", "compress")
    with pytest.raises(OptionError, match=r"^the method acip needs --size and --statistics: hesse compress MODEL OUT"):
        find_method("acip", "compress")


def test_a_registry_lists_its_names_when_one_is_missing() -> None:
    fruit: Registry[int] = Registry("fruit")
    assert fruit.register("apple", 1) == 1
    assert fruit.find("apple") == 1
    with pytest.raises(OptionError, match="there is no fruit 'pear'; there are apple"):
        fruit.find("pear")
    with pytest.raises(OptionError, match="there is already a fruit 'apple'"):
        fruit.register("apple", 2)
