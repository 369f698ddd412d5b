"""Recipes and data that anybody may have written: each is read, or refused by name, in little time."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import JSON, LIMITED, folder, survives
from hesse.data.sources import read_sources
from hesse.errors import DataError, OptionError
from hesse.methods import load_recipe

# Recipes.

RULE: dict[str, Any] = {
    "layers": ["*"],
    "curvature": "gram",
    "constraint": {"grid": {"bits": 4}},
    "solver": {"name": "error_feedback"},
}
RECIPES = [
    b"a: !!python/object/apply:os.system ['true']",
    b"a: !!python/name:os.system",
    b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]",
    b"a: &a {x: 1}\nb: &b {<<: [*a,*a]}",
    b"a: &a [*a]",
    b"[" * 5000,
    b"{" * 5000,
    b"- " * 5000,
    b"? " * 3000,
    b"a: 1\na: 2",
    b"rules: []\nrules: []",
    b"? [a]\n: b",
    b"a: 2001-13-45",
    b"a: !!bool perhaps",
    b"a: !!int x",
    b"a: !!float x",
    b"a: !!timestamp x",
    b"a: !!binary x",
    b"a: !!null x",
    b"a: !!set {x}",
    b"a: " + b"9" * 5000,
    b"a: 0x" + b"f" * 5000,
    b"a: 1" + b":59" * 2000,
    b'a: "\\ud800"',
    b'"\\ud800": 1',
    b'"a\\nb\\e[31m": 1',
    b"\xff",
    b"\x00",
    b"",
    b"%YAML 9.9\n---\n",
    b"--- a\n--- b",
    yaml.safe_dump({"rules": [{**RULE, "constraint": {"grid": {"bits": 2**70}}}]}).encode(),
    yaml.safe_dump({"rules": [{**RULE, "constraint": {"sparse": {"amount": float("nan")}}}]}).encode(),
    yaml.safe_dump({"rules": [{**RULE, "constraint": {"sparse": {"amount": "9" * 5000 + ":4"}}}]}).encode(),
    yaml.safe_dump({"rules": [{**RULE, "constraint": {"sparse": {"amount": "1e400"}}}]}).encode(),
    yaml.safe_dump({"rules": [{**RULE, "layers": ["[!]-a" * 50, "*a" * 500]}]}).encode(),
]


def read_recipe(text: bytes) -> None:
    with folder() as place:
        (place / "recipe.yaml").write_bytes(text)

        def read() -> None:
            for rule in load_recipe(place / "recipe.yaml").rules:
                for pattern in rule.layers:
                    assert isinstance(pattern, str)

        survives(read, OptionError)


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_recipes_that_were_found(text: bytes) -> None:
    read_recipe(text)


@LIMITED
@given(st.one_of(st.binary(max_size=40), st.text("[]{}:-&*!<>?|'\"\\ \n#%@`,.ab01", max_size=40).map(str.encode)))
def test_recipes_of_bytes(text: bytes) -> None:
    read_recipe(text)


@LIMITED
@given(st.sampled_from(["layers", "curvature", "constraint", "solver"]), JSON)
@example("constraint", {"grid": {"bits": 10**400}})
@example("constraint", {"grid": {"group_size": -(10**30)}})
@example("constraint", {"low_rank": {"rank": 10**30}})
@example("layers", {"*": None})
@example("solver", {"name": "nearest", "damping": float("inf")})
def test_recipes_of_other_kinds(key: str, value: Any) -> None:
    read_recipe(json.dumps({"rules": [{**RULE, key: value}]}).encode())


def test_recipes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    for text, named in (("a: &x 1\nb: *x", "alias"), ("a: 1\na: 2", "twice"), ("[" * 30, "levels"), ("a: &x 1", "a:")):
        path.write_text(text)
        with pytest.raises(OptionError, match=named):
            load_recipe(path)
    monkeypatch.setattr("hesse.methods.plain_yaml.LARGEST", 3)
    with pytest.raises(OptionError, match="more than 3 bytes"):
        load_recipe(path)


# JSON lines.

LINES = [
    b"[" * 100_000,
    b'{"text": NaN}',
    b'{"text": Infinity}',
    b'{"input_ids": [1e400, 2]}',
    b'{"input_ids": [NaN, 2]}',
    b'{"input_ids": ' + b"9" * 5000 + b"}",
    b'{"input_ids": [' + b"9" * 5000 + b", 1]}",
    b'{"input_ids": [true, false]}',
    b'{"input_ids": {"0": 1}}',
    b'{"input_ids": "12"}',
    b'{"text": "\\ud800"}',
    b'{"text": null}',
    b'{"text": {"text": "a"}}',
    b'{"text": "a", "text": 3}',
    b'{"text": "a"}\n{"input_ids": [1, 2]}',
    b'{"\\ud800": 1}',
    b"\xff\xfe",
    b"\x00",
    b"\xef\xbb\xbf{}",
    b"null",
    b"3",
    b'"text"',
]


def read_lines(text: bytes) -> None:
    with folder() as place:
        (place / "text.jsonl").write_bytes(text)

        def read() -> None:
            (source,) = read_sources(place / "text.jsonl", "calibration")
            content = source.content
            assert all(record.sample(100).ndim == 1 for record in content.samples)
            assert all(isinstance(text, str) for text in content.texts)
            assert all(chat.messages for chat in content.chats)

        survives(read, DataError)


@pytest.mark.parametrize("text", LINES, ids=range(len(LINES)))
def test_lines_that_were_found(text: bytes) -> None:
    read_lines(text)


@pytest.mark.parametrize("text", [line for line in LINES if b"\n" not in line and b'"text": "a"' not in line])
def test_a_bad_line_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes(b'{"text": "good"}\n\n' + text + b"\n")
    with pytest.raises(DataError, match="line 3"):
        read_sources(tmp_path / "text.jsonl", "calibration")


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesse.data.readers.LONGEST_LINE", 100)
    (tmp_path / "text.jsonl").write_text('{"text": "good"}\n{"text": "' + "a" * 1000)
    with pytest.raises(DataError, match="line 2 has more than 100 bytes"):
        read_sources(tmp_path / "text.jsonl", "calibration")


@LIMITED
@given(st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps({"input_ids": value}).encode())))
def test_lines_of_anything(text: bytes) -> None:
    read_lines(text)
