"""Nothing that comes with a model is run: not its code, not what a loader could be made to unpack or import."""

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hesse
import tiny_models
from helpers import CommandLine
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.errors import DataError

FolderOf = Callable[[str], Path]
PACKAGE = Path(str(hesse.__file__)).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
IMPORTERS = (PACKAGE / "__init__.py", PACKAGE / "registry.py")  # import modules of their own tables, and entry points
RENDERER = PACKAGE / "data" / "chats.py"  # renders a tokenizer's chat template in transformers' sandbox, for chats only
TEXT = "".join(f"def f{n}(a, b):\n    return a * {n} + b\n\n\n" for n in range(400))
# Modules that transformers would be led to, and some that a process that starts in the folder would import.
CODE = ("configuration_own", "modeling_own", "tokenization_own", "modeling_low_rank", "conversion_mapping")
SAFE = ("_Loader", "yaml.BaseLoader")  # a SafeLoader of ours, and one that makes strings only
FIRST = ("runpy", "json", "numpy", "torch", "resource", "sitecustomize", "usercustomize", "hesse")


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A model whose folder is full of code, all of which leaves a mark when it is run."""
    folder, mark = tiny_models.save("llama", tmp_path / "model", vocab_size=4096), tmp_path / "mark"
    for path in DEFAULT_FOLDER.glob("tokenizer*"):
        shutil.copy(path, folder)
    for name in (*CODE, *FIRST):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write(__name__)\n")
    edit(folder / "config.json", auto_map(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")))
    edit(
        folder / "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}},
    )
    edit(folder / "generation_config.json", {"custom_generate": "./"})
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "no-one/nothing"}')
    (folder / "text.txt").write_text(TEXT)
    yield folder
    assert not mark.exists(), mark.read_text()


def auto_map(names: tuple[str, ...]) -> dict[str, object]:
    return {"auto_map": {name: f"{'configuration' if 'Config' in name else 'modeling'}_own.Own" for name in names}}


def edit(path: Path, changes: dict[str, object]) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def never(*_: object) -> str:
    raise AssertionError("a person was asked whether to run the model's code")


def test_no_command_runs_what_lies_in_the_folder(
    trap: Path, hesse_command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", never)
    monkeypatch.chdir(trap)
    out, text = tmp_path / "out", ("--data", trap / "text.txt", "--length", "16")
    report = ("--samples", "2", "--report", tmp_path / "page.html")
    short = ("--prompt", "4", "--generate", "1", "--repeats", "1", "--threads", "1", "--runtimes", "transformers")
    assert hesse_command("compress", trap, out, *text, "--group-size", "32", *report).code == 0
    assert hesse_command("evaluate", out, "--reference", trap, *text, "--samples", "2").code == 0
    assert hesse_command("inspect", trap, *text, "--samples", "2").code == 0
    assert hesse_command("export", out, tmp_path / "out.gguf").code == 0
    ran = hesse_command("benchmark", ".", *short, "--json")
    assert len(json.loads(ran.stdout)["rows"]) == 1, ran.stdout


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_a_model_of_its_own_code_is_refused(
    part: str, trap: Path, hesse_command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", never)
    if part == "config":
        edit(trap / "config.json", {"model_type": "own", "architectures": ["OwnForCausalLM"]})
    else:
        edit(trap / "tokenizer_config.json", {"tokenizer_class": "OwnTokenizer"})
        edit(trap / "config.json", {"tokenizer_class": None})
    for command in (("compress", trap, tmp_path / "out"), ("evaluate", trap), ("inspect", trap), ("benchmark", trap)):
        more = () if command[0] == "benchmark" else ("--data", trap / "text.txt", "--length", "32", "--samples", "2")
        ran = hesse_command(*command, *more)
        assert ran.code in (0, 1), ran.stderr  # a tokenizer.json may be read without the class of its own
        assert "Traceback" not in ran.stderr


def test_a_panic_of_the_tokenizer_is_an_error_of_ours(trap: Path) -> None:
    content = json.loads((trap / "tokenizer.json").read_text())
    panics = (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"truncation": {"max_length": 1, "stride": 1, "strategy": "LongestFirst", "direction": "Right"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {
            "model": {
                "type": "BPE",
                "vocab": {"h": 0, "e": 1, "he": 2},
                "merges": [["h", "e"]],
                "continuing_subword_prefix": "##",
            }
        },
    )
    messages = []
    for panic in panics:
        (trap / "tokenizer.json").write_text(json.dumps({**content, **panic}))
        try:
            hesse.evaluate(trap, data=trap / "text.txt", samples=1, length=8)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) >= 2
    assert all("tokenizer" in message or "too short" in message for message in messages)


# The source.


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            yield name, node


def given(call: ast.Call, name: str) -> object:
    """The constant that an argument is given as."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_in_the_source_could_run_what_it_reads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "importlib.import_module"}
            assert not forbidden & {part for name in names for part in (name, name.split(".")[0])}
    for name, call in calls(tree):
        place = f"{path.name}:{call.lineno}"
        if name == "from_pretrained":
            assert given(call, "trust_remote_code") is False, place
            assert given(call, "local_files_only") is True, place
        if name == "load" and isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            module = call.func.value.id
            assert module != "torch" or given(call, "weights_only") is True, place
            assert module not in ("np", "numpy") or given(call, "allow_pickle") is False, place
            assert module != "yaml" or ast.unparse(call.args[1]) in SAFE, place
        assert name not in ("unsafe_load", "full_load"), place
        assert name != "apply_chat_template" or path == RENDERER, place
        assert name != "import_module" or path in IMPORTERS, place
        assert given(call, "trust_remote_code") is not True, place
        assert given(call, "shell") is not True, place
        if isinstance(call.func, ast.Name):
            assert name not in ("eval", "exec", "compile", "__import__"), place
