"""Importing hesse and asking the command line for help loads nothing that computes."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hesse

# Without pydantic, which typer imports itself to check values.
HEAVY = ("torch", "transformers", "numba", "scipy", "safetensors", "numpy", "huggingface_hub", "tokenizers")
MOST_NAMES = 31


def loaded_after(code: str) -> set[str]:
    """Return the names in HEAVY that a new interpreter has loaded after `code`."""
    script = (
        f"import json, sys\ntry:\n    {code}\nfinally:\n    sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return set(json.loads(ran.stderr.splitlines()[-1])) & set(HEAVY)


@pytest.mark.parametrize(
    "code",
    [
        "import hesse; dir(hesse)",
        "import hesse.result, hesse.errors",
        *(
            f"import sys; sys.argv = ['hesse', {words}]; from hesse.cli import main; main()"
            for words in ("", "'--help'", "'--version'", "'evaluate', '--help'", "'prune', '--nothing'")
        ),
    ],
)
def test_nothing_that_computes_is_loaded(code: str) -> None:
    assert loaded_after(code.replace(", ]", "]")) == set()


def test_a_name_loads_what_it_needs() -> None:
    assert loaded_after("import hesse; hesse.Gram") >= {"torch"}
    assert "transformers" not in loaded_after("import hesse; hesse.solve, hesse.Gram, hesse.Grid, hesse.ErrorFeedback")


def test_every_public_name_is_there() -> None:
    for name in hesse.__all__:
        assert getattr(hesse, name) is not None
        assert name in dir(hesse)
    for package in hesse.PACKAGES:
        assert getattr(hesse, package).__name__ == f"hesse.{package}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hesse.nothing


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(hesse.__file__)).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "importlib"]
    seen = {entry.asname: node.module for node in imports for entry in node.names if node.module != "typing"}
    assert seen == hesse.HOMES


def test_the_public_names_can_be_read_at_one_glance() -> None:
    assert len(hesse.__all__) <= MOST_NAMES
    undocumented = [name for name in hesse.__all__ if name != "__version__" and name not in str(hesse.__doc__)]
    assert undocumented == []
