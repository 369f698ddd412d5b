"""Files that lie: names and links that lead elsewhere, headers, JSON. Each is refused by name, or left alone."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hesse
from helpers import IDS, WEIGHTS, CommandLine, write_ids
from hesse.checkpoints.checkpoint import INDEX, Checkpoint
from hesse.checkpoints.files import DEEPEST_JSON, belongs, read_json, unfinished_file
from hesse.checkpoints.locate import DEFAULT_FOLDER, locate
from hesse.checkpoints.output import companion_notes, copy_companions
from hesse.errors import CheckpointError
from hesse.estimation import Statistics, load_curvature
from hesse.formats import open_checkpoint

FolderOf = Callable[[str], Path]


@pytest.fixture
def model(family_folder: FolderOf, tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may damage."""
    return Path(shutil.copytree(family_folder("llama"), tmp_path / "model"))


def write_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# Names of shards.


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", 3, None, ["x"], {}],
)
def test_a_shard_is_a_file_of_the_folder(name: object, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    tensors = load_file(model / WEIGHTS)
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(CheckpointError, match="is not the name of a file in this folder"):
        open_checkpoint(model)


def test_a_hub_cache_of_links_is_read_and_copied(model: Path, tmp_path: Path) -> None:
    entry = tmp_path / "hub" / "models--owner--name"
    snapshot, shared = entry / "snapshots" / "0123", tmp_path / "hub" / "blobs" / "ab"
    for folder in (snapshot, entry / "blobs", shared):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, entry / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (shared / ("ab" * 32)).write_text("{}")
    (entry / "blobs" / "large").symlink_to(f"../../blobs/ab/{'ab' * 32}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/large")
    (tmp_path / "out").mkdir()
    assert open_checkpoint(snapshot).names()
    assert copy_companions(snapshot, tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["generation_config.json", "tokenizer.json"]
    assert not belongs(tmp_path / "hub" / "blobs" / "ab", snapshot)


def test_links_out_of_the_folder_are_not_copied(model: Path, hesse_command: CommandLine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.json").write_text("the secret")
    (model / "tokenizer.txt").symlink_to(secret / "key.json")
    (model / "LICENSE").symlink_to("../secret/key.json")
    (model / "below").symlink_to(secret)
    (model / "own.txt").symlink_to("config.json")
    (model / "tokenization_own.py").write_text("raise SystemExit")
    out, data = tmp_path / "out", write_ids(tmp_path / "ids.jsonl", IDS[:2])
    ran = hesse_command("compress", model, out, "--method", "rtn", "--group-size", "32", "--data", data, "--json")
    assert ran.code == 0, ran.stderr
    written = [path for path in out.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() or b"the secret" in path.read_bytes() for path in written)
    assert {"own.txt", "tokenization_own.py"} <= {path.name for path in written}
    notes = " ".join(json.loads(ran.stdout)["notes"])
    for name in ("tokenizer.txt", "LICENSE", "below/key.json"):
        assert f"{name} was not copied: it is a link to {secret / 'key.json'}" in notes
    assert "tokenization_own.py: code that came with the model was copied, not run" in notes


@pytest.mark.parametrize("linked", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json"])
def test_links_out_of_the_folder_are_not_exported(linked: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for path in DEFAULT_FOLDER.glob("tokenizer*"):
        shutil.copy(path, model)
    (model / linked).unlink(missing_ok=True)
    (tmp_path / "secret").write_text(json.dumps({"chat_template": "the secret"}))
    (model / linked).symlink_to(tmp_path / "secret")
    report = hesse.export(model, tmp_path / "out.gguf").report
    assert b"the secret" not in (tmp_path / "out.gguf").read_bytes()
    assert ("the tokenizer is left out" in " ".join(report.notes)) == (linked == "tokenizer.json")


def test_a_link_that_leads_nowhere_is_left_out(model: Path) -> None:
    (model / "loop.txt").symlink_to("loop.txt")
    (model / "gone.txt").symlink_to("nothing")
    assert companion_notes(model) == []


def test_an_unfinished_file_waits_for_nobody(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".page.html.unfinished").symlink_to(victim)
    with unfinished_file(tmp_path / "page.html") as unfinished:
        assert unfinished.name != ".page.html.unfinished"
        unfinished.write_text("page")
    umask = os.umask(0)
    os.umask(umask)
    assert victim.read_text() == "mine"
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(ZeroDivisionError), unfinished_file(tmp_path / "other") as unfinished:
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == [".page.html.unfinished", "page.html", "victim"]


# Headers.


def entry(shape: list[Any], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HEADERS: dict[str, tuple[object, bytes, int | None]] = {
    "a header of 2^63 bytes": (b"{}", b"", 2**63),
    "a header beyond the file": (b"{}", b"", 3),
    "no header": (b"", b"", 0),
    "offsets beyond the file": ({"a": entry([4], 0, 16)}, bytes(8), None),
    "bytes of nobody": ({"a": entry([1], 0, 4)}, bytes(8), None),
    "overlapping": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), None),
    "a shape too large to count": ({"a": entry([2**32, 2**32], 0, 0)}, b"", None),
    "a shape larger than its bytes": ({"a": entry([2**40], 0, 8)}, bytes(8), None),
    "a negative shape": ({"a": entry([-1], 0, 4)}, bytes(4), None),
    "a shape of no whole number": ({"a": entry([1.5], 0, 4)}, bytes(4), None),
    "backwards": ({"a": entry([1], 4, 0)}, bytes(4), None),
    "empty, and too wide for torch": ({"a": entry([0, 2**63], 0, 0)}, b"", None),
    "a hundred thousand dimensions": ({"a": entry([1] * 100_000, 0, 4)}, bytes(4), None),
    "one name twice": (TWICE, bytes(8), None),
    "no UTF-8": (b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), None),
    "half a character": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), None),
    "nested": (b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", None),
    "a list": (b"[]", b"", None),
    "a type that torch lacks": ({"a": entry([4], 0, 3, "F6_E2M3")}, bytes(3), None),
    "a type of half bytes": ({"a": entry([2], 0, 1, "F4")}, bytes(1), None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    header, data, length = HEADERS[name]
    write_header(tmp_path / WEIGHTS, header, data, length)
    with pytest.raises(CheckpointError, match=WEIGHTS) as caught:
        Checkpoint(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_file_full_of_holes_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    size = 1 << 43  # 8 TB, of which the disk holds nothing
    write_header(tmp_path / WEIGHTS, {"a": entry([size // 4], 0, size)})
    try:
        os.truncate(tmp_path / WEIGHTS, (tmp_path / WEIGHTS).stat().st_size + size)
    except OSError:
        pytest.skip("this file system has no such files")
    with pytest.raises(CheckpointError, match=WEIGHTS):
        Checkpoint(tmp_path).read(["a"])


# JSON.


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 200_000, "is not valid JSON"),
        ('{"a":' * (DEEPEST_JSON + 1) + "1" + "}" * (DEEPEST_JSON + 1), "levels deep"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[1]", "does not hold a JSON object"),
        ("", "is not valid JSON"),
        ("\ufeff{}", "is not valid JSON"),
    ],
    ids=range(6),
)
def test_json_that_is_none(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=named):
        read_json(tmp_path / "config.json")


def test_json_is_read_from_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # reading it would wait for ever
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match="is missing"):
            read_json(path)
    (tmp_path / "large.json").write_text('{"a": 1}')
    monkeypatch.setattr("hesse.checkpoints.files.LARGEST_JSON", 4)
    with pytest.raises(CheckpointError, match="has more than 4 bytes"):
        read_json(tmp_path / "large.json")


# Statistics, and names of models.


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        "{}",
        "3",
        '{"curvature": "Path", "fields": {}}',
        '{"curvature": "Gram", "fields": {"nothing": 1}}',
        '{"curvature": ["Gram"], "fields": 3}',
        '{"origin": {"nothing": 1}}',
        '{"tuple": 3}',
        '{"tensor": "a"}',
        '{"tensor": ["a"]}',
    ],
    ids=range(10),
)
def test_a_curvature_that_is_none(header: str, tmp_path: Path) -> None:
    path = tmp_path / "gram.safetensors"
    save_file({"a": torch.ones(2)}, path, {"hesse_curvature": header})
    with pytest.raises(CheckpointError, match=r"gram\.safetensors"):
        load_curvature(path)


GOOD = {
    "model_files": {},
    "samples_fingerprint": "",
    "samples": {"data": None, "samples": 1, "length": 8, "seed": 0, "bos": None},
    "curvatures": {"gram": {"a": "gram-00001.safetensors"}},
}


def test_statistics_that_lead_elsewhere(tmp_path: Path) -> None:
    def write(**edit: object) -> None:
        (tmp_path / "statistics.json").write_text(json.dumps({**GOOD, **edit}))

    write()
    assert Statistics(tmp_path).content == GOOD
    samples: dict[str, object] = {"data": None, "samples": 1, "length": 8, "seed": 0, "bos": None}
    for edit in (
        {"curvatures": {"gram": {"a": "../gram.safetensors"}}},
        {"curvatures": {"gram": {"a": "/tmp/gram.safetensors"}}},
        {"curvatures": {"gram": ["a"]}},
        {"curvatures": 3},
        {"model_files": None},
        {"samples": {}},
        {"samples": {**samples, "data": 3}},
        {"samples": {**samples, "command": "x"}},
        {"samples_fingerprint": None},
    ):
        write(**edit)
        with pytest.raises(CheckpointError, match="is not as `hesse estimate` writes it"):
            Statistics(tmp_path)


NO_HUB_IDS = (
    *("a/..", "../a", "a/b..c", "~nobody/a", "~nobody", "a//b", "/a/b", "http://a", "a/b/c", "-a/b", "a /b", "a\0/b"),
    *("\x1b[31m/b", "é/b", "a" * 5000),
)


@pytest.mark.parametrize("name", NO_HUB_IDS, ids=range(len(NO_HUB_IDS)))
def test_names_that_are_no_hub_ids(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        locate(name)


def test_nothing_is_asked_of_the_network_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="is not a folder here, and the hub does not provide it"):
        locate("no-one/no-model")
