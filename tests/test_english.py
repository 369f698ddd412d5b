"""Docstrings are plain technical English: they begin with a verb or name the thing, without house words."""

import ast
import re
from pathlib import Path

import hesse

ROOT = Path(hesse.__file__).parent
BAD_BEGINNING = re.compile(r"(What|Which|Whether|How|Those|Of|That|Where|Everything that|Meanwhile)\b")
HOUSE_WORDS = re.compile(
    r"\b(made good|dear|feels?|silent|goes|gone|stands? in|stand-ins?|told|given back|so many|as many|manieth|bettered"
    r"|a person|meanwhile|at once|in turn|amid|spoilt|foretells?|beside|besides|thin layers?|person types)\b",
    re.IGNORECASE,
)


def docstrings() -> list[tuple[str, str]]:
    """Place and text of each public docstring of the package."""
    # The model file of the low-rank format is written into checkpoints, byte by byte.
    files = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "modeling_low_rank.py"]
    return [(f"{path.relative_to(ROOT)}:{line}", text) for path in files for line, text in _public(path)]


def _public(path: Path) -> list[tuple[int, str]]:
    module = ast.parse(path.read_text(encoding="utf-8"))
    texts = [(1, ast.get_docstring(module) or "")]
    nodes: list[ast.AST] = list(module.body)
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            texts.append((node.lineno, ast.get_docstring(node) or ""))
            if isinstance(node, ast.ClassDef):
                nodes.extend(node.body)
    return [(line, text) for line, text in texts if text]


def test_docstrings_begin_with_a_verb_or_name_the_thing() -> None:
    """Not with `What`, `Whether`, `How`, ..., which make a clause of what should be a sentence or a name."""
    assert not [f"{place}: {text.splitlines()[0]}" for place, text in docstrings() if BAD_BEGINNING.match(text)]


def test_docstrings_use_the_words_of_the_field() -> None:
    """No word that only this project would understand so."""
    assert not [f"{place}: {word[0]!r}" for place, text in docstrings() for word in HOUSE_WORDS.finditer(text)]


def test_there_are_docstrings() -> None:
    """No public docstring was lost."""
    assert len(docstrings()) > 1698  # before the package was rebuilt
