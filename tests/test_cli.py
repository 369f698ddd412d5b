"""What the commands print, for people and for machines."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

import hesse
import tiny_models
from helpers import CommandLine, left_over, sha256, write_ids
from hesse.cli import app
from hesse.cli.app import COMMANDS, Command
from hesse.errors import OptionError
from hesse.methods import DEFAULT_METHOD, METHODS, find_methods, load_recipe, methods_of

COMPRESSING = methods_of("compress")

FolderOf = Callable[[str], Path]
LONG = 600  # seconds that a process may take on a busy machine


def test_version(hesse_command: CommandLine) -> None:
    ran = hesse_command("--version")
    assert (ran.code, ran.stdout, ran.stderr) == (0, f"hesse {hesse.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_has_an_example(command: Command) -> None:
    result = CliRunner().invoke(app, [command.name, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert f"Example: {command.example}" in result.stdout
    assert command.example.startswith(f"hesse {command.name}")


def test_help_names_every_command(hesse_command: CommandLine) -> None:
    ran = hesse_command("--help")
    assert ran.code == 0
    places = [ran.stdout.index(f" {command.name} ") for command in COMMANDS]
    assert places == sorted(places)
    assert all(panel in ran.stdout for panel in ("Change a model", "Look at a model", "Run it elsewhere"))


def parameters() -> Iterator[tuple[str, str, type, Any]]:
    """Yield command, parameter, type without None, and the argument or option of every parameter of every command."""
    for command in COMMANDS:
        for name, hint in get_type_hints(command.run, include_extras=True).items():
            if name != "return":
                kinds = [kind for kind in get_args(hint.__origin__) or (hint.__origin__,) if kind is not NoneType]
                yield command.run.__name__, name, kinds[0], hint.__metadata__[0]


def test_every_help_text_is_a_phrase_of_its_own() -> None:
    for command in COMMANDS:
        assert re.match(r"[A-Z].*[.)]$", (command.run.__doc__ or "").strip(), re.DOTALL), command
    for command, name, _, info in parameters():
        assert re.match(r"[A-Z].*[.)]$", info.help or ""), f"{command} {name}: {info.help!r}"


def test_an_option_means_the_same_in_every_command() -> None:
    meanings: dict[str, set[tuple[str, type]]] = {}
    for _, name, kind, info in parameters():
        if isinstance(info, OptionInfo):
            meanings.setdefault(name, set()).add((info.help or "", kind))
    assert {option: kinds for option, kinds in meanings.items() if len(kinds) > 1} == {}
    assert "statistics" in meanings


def test_the_default_method_is_the_one_that_help_names() -> None:
    (shown,) = (
        info.show_default for command, name, _, info in parameters() if (command, name) == ("compress", "method")
    )
    assert shown == DEFAULT_METHOD


def test_without_a_command_it_says_where_to_begin(hesse_command: CommandLine) -> None:
    ran = hesse_command()
    assert (ran.code, ran.stderr) == (0, "")
    for line in ("hesse demo", "hesse compress MODEL OUT", "hesse methods", "hesse --help"):
        assert line in ran.stdout


def test_the_table_of_methods(hesse_command: CommandLine) -> None:
    table = hesse_command("methods")
    assert table.code == 0
    assert all(name in table.stdout for name in METHODS)
    rows = json.loads(hesse_command("methods", "--json").stdout)
    assert [row["method"] for row in rows] == [row.name for family in find_methods(()).values() for row in family]
    for row in rows:
        assert row.keys() == {
            "method",
            "family",
            "verb",
            "use",
            "curvature",
            "constraint",
            "optional",
            "basis",
            "partition",
            "solver",
            "score",
            "schedule",
            "needs",
            "source",
            "run",
            "rewrite",
            "options",
        }
        assert all(row[key] for key in ("method", "family", "verb", "constraint", "solver", "needs", "source", "run"))
    some = json.loads(hesse_command("methods", "pruning", "gptq", "--json").stdout)
    assert [row["method"] for row in some] == ["gptq", *(row.name for row in find_methods(["pruning"])["pruning"])]
    refused = hesse_command("methods", "gtpq")
    assert refused.code != 0
    assert "no method or family 'gtpq'; families are rounding" in refused.stderr


@pytest.mark.parametrize("method", COMPRESSING)
def test_a_printed_recipe_is_the_same_plan(method: str, hesse_command: CommandLine, tmp_path: Path) -> None:
    printed = hesse_command("compress", "MODEL", "--method", method, "--ignore", "down_proj", "--print-recipe").stdout
    file = tmp_path / "recipe.yaml"
    file.write_text(printed, encoding="utf-8")
    assert load_recipe(file) == COMPRESSING[method].recipe(hesse.Options(), ("down_proj",))
    assert hesse_command("compress", "MODEL", "--recipe", file, "--print-recipe").stdout == printed


def test_a_recipe_does_what_its_options_do(family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path) -> None:
    options = (
        "--method",
        "gptq",
        "--bits",
        "3",
        "--group-size",
        "32",
        "--symmetric",
        "--no-act-order",
        "--damping",
        "0.1",
    )
    data = ("--data", write_ids(tmp_path / "ids.jsonl"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(hesse_command("compress", "MODEL", *options, "--print-recipe").stdout, encoding="utf-8")
    model = family_folder("llama")
    assert hesse_command("compress", model, tmp_path / "a", *options, *data).code == 0
    assert hesse_command("compress", model, tmp_path / "b", "--recipe", recipe, *data).code == 0
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rules: [{curvature: gram, constraint: {grid: {bitz: 3}}, solver: {name: nearest}}]", "bitz"),
        ("rules: [{curvature: gram, constraint: {grid: {bits: 3}}, solver: {name: nearest}}]\ncolour: red", "colour"),
        ("rules: [{curvature: hessian, constraint: {grid: {bits: 3}}, solver: {name: nearest}}]", "curvature"),
        ("rules: [{curvature: gram, constraint: {grid: {bits: 1}}, solver: {name: nearest}}]", "bits is 1"),
        ("rules: []", "rules"),
        ("rules: [", "not valid YAML"),
        ("", "not valid"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(
    text: str, named: str, hesse_command: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    ran = hesse_command("compress", "MODEL", "OUT", "--recipe", file)
    assert ran.code == 2
    assert ran.error.startswith("Error: ")
    assert named in ran.error


def test_a_recipe_leaves_no_room_for_options(hesse_command: CommandLine, tmp_path: Path) -> None:
    for extra in (("--bits", "3"), ("--method", "rtn"), ("--ignore", "x")):
        ran = hesse_command("compress", "MODEL", "OUT", "--recipe", tmp_path / "recipe.yaml", *extra)
        assert (ran.code, "--recipe says everything" in ran.error) == (2, True)
    assert "recipe.yaml cannot be read" in hesse_command("compress", "M", "--recipe", tmp_path / "recipe.yaml").error


def test_errors_are_exceptions_inside_python() -> None:
    result = CliRunner().invoke(app, ["compress", "MODEL", "--method", "gptq"])
    assert isinstance(result.exception, OptionError)
    assert "OUT is missing" in str(result.exception)


def test_compress_prints_everything_for_machines(
    half_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path
) -> None:
    arguments = ("--bits", "4", "--group-size", "32", "--data", write_ids(tmp_path / "ids.jsonl"), "--json")
    ran = hesse_command("compress", half_folder("llama"), tmp_path / "out", *arguments)
    assert (ran.code, ran.stderr) == (0, "")
    report = json.loads(ran.stdout)
    assert report == json.loads((tmp_path / "out" / "hesse-report.json").read_text(encoding="utf-8"))
    numbers = ("peak_rss_bytes", "bytes_before", "bytes_after", "bits_per_weight")
    assert all(report[key] > 0 for key in numbers)
    assert report["method"] == "kronecker"
    assert report["seconds"]["total"] > 0
    assert report["notes"] == []
    assert len(report["layers"]) == 14
    for layer in report["layers"]:
        assert layer["predicted_loss_increase"] > 0
        assert 0 < layer["relative_output_error"] < 1
        assert layer["tokens"] == 256
        assert layer["damping"] == 0.01
    assert report["loss"]["measured"] > 0
    assert report["loss"]["predicted"] > 0


def test_compress_and_evaluate_print_for_people(
    family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path
) -> None:
    data = ("--data", write_ids(tmp_path / "ids.jsonl"))
    source, out = family_folder("llama"), tmp_path / "out"
    ran = hesse_command("compress", source, out, "--bits", "4", "--group-size", "48", *data)
    assert ran.code == 0
    for expected in ("Kronecker × Grid", "loss increase predicted", "read back: 21 tensors", " note"):
        assert expected in ran.stdout
    table = hesse_command("evaluate", out, "--reference", source, *data)
    assert table.code == 0
    assert "KL(reference || model)" in table.stdout
    found = json.loads(hesse_command("evaluate", out, "--reference", source, *data, "--json").stdout)
    again = hesse.evaluate(out, reference=source, data=str(data[1])).report.to_dict()
    assert {**found, "seconds": 0} == {**again, "seconds": 0}


def start(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """`python -m hesse` as a shell in a terminal starts it: Ctrl-C reaches it, whatever started these tests."""
    return subprocess.Popen(
        [sys.executable, "-m", "hesse", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_in_the_middle_leaves_no_checkpoint(family_folder: FolderOf, tmp_path: Path) -> None:
    data = write_ids(tmp_path / "ids.jsonl", tiny_models.random_ids(512, 128))
    arguments = ("--data", data, "--batch-size", "1", "--json")
    with start(tmp_path, "compress", family_folder("llama"), "new/out", *arguments) as process:
        deadline = time.monotonic() + LONG
        while not list(tmp_path.glob("new/.out.unfinished/journal-0/check-*.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate(timeout=LONG)
    assert (process.returncode, printed) == (130, "")
    kept = "was not written; the finished part is kept, and the same command resumes."
    assert error == f"Interrupted: new/out {kept}\n"
    assert left_over(tmp_path / "new") == [".out.unfinished"]


def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    with start(tmp_path, "compress", "./nothing", "out") as process:
        printed, error = process.communicate(timeout=LONG)
    assert (process.returncode, printed) == (1, "")
    expected = "Error: ./nothing is not a folder; give a model folder, `default`, or a hub id such as owner/name"
    assert error.strip() == expected
