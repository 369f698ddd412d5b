"""What is written has the permissions that the umask leaves: files, folders, and what is renamed at the end."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import hesse
from helpers import IDS, compress, write_ids
from hesse.checkpoints import writer
from hesse.checkpoints.checkpoint import INDEX
from hesse.checkpoints.writer import write_tensors
from hesse.curvature import Gram, SquaredError
from hesse.estimation import save_curvature
from hesse.reporting.page import write_page
from hesse.training import Training, finetune

FolderOf = Callable[[str], Path]
PACKAGE = Path(hesse.__file__).parent
BITS = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002], ids="umask {:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def source(family_folder: FolderOf, tmp_path: Path) -> Path:
    """A model with companions in a folder of its own, all of them for their owner alone."""
    folder = Path(shutil.copytree(family_folder("llama"), tmp_path / "source"))
    (folder / "templates").mkdir(mode=0o700)
    for name in ("tokenizer_config.json", "templates/chat.json", "LICENSE"):
        (folder / name).write_text("{}")
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return folder


def wrong(umask: int, *written: Path) -> dict[str, str]:
    """The permissions of files and folders, below those that were written too, that the umask would not give."""
    found = {}
    for top in written:
        assert top.exists()
        for path in (top, *top.rglob("*")):
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            if (mode := path.stat().st_mode & 0o7777) != expected:
                found[path.relative_to(top.parent).as_posix()] = oct(mode)
    return found


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1 << 16])
@pytest.mark.parametrize("options", [BITS, {"method": "magnitude", "sparsity": 0.5}, {"method": "svd", "rank": 4}])
def test_of_a_compressed_model(
    options: dict[str, object],
    shard_bytes: int,
    umask: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(writer, "LARGE_BYTES", shard_bytes)
    out = tmp_path / "new" / "deeper" / "out"
    compress(source, out, **options)
    assert wrong(umask, tmp_path / "new") == {}
    assert (out / "templates" / "chat.json").exists()
    assert (out / INDEX).exists() == (shard_bytes < 1 << 30)


def test_of_a_model_that_replaces_another(umask: int, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(source, out, **BITS)
    for path in (out, *out.rglob("*")):
        path.chmod(0o700)
    compress(source, out, **BITS, overwrite=True)
    assert wrong(umask, out) == {}


def test_of_statistics_and_what_is_cut_by_them(umask: int, source: Path, tmp_path: Path) -> None:
    statistics, data = tmp_path / "statistics", write_ids(tmp_path / "ids.jsonl")
    hesse.estimate(source, statistics, curvatures=("gram", "kronecker", "fisher"), data=data)
    hesse.compress(source, tmp_path / "cut", method="acip", size="60%", statistics=statistics)
    assert wrong(umask, statistics, tmp_path / "cut") == {}


@pytest.mark.parametrize("format", ["adapter", "dense"])
def test_of_a_repaired_model(format: str, umask: int, source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", **BITS)
    hesse.repair(source, tmp_path / "out", tmp_path / "repaired", data=IDS, rank=4, format=format)
    assert wrong(umask, tmp_path / "repaired") == {}


def test_of_models_of_another_shape(umask: int, source: Path, tmp_path: Path) -> None:
    hesse.rotate(source, tmp_path / "rotated", data=IDS)
    hesse.prune(source, tmp_path / "narrow", what="hidden", keep=0.5, data=IDS)
    hesse.prune(source, tmp_path / "fewer", what="blocks", keep=0.5, data=IDS)
    assert wrong(umask, tmp_path / "rotated", tmp_path / "narrow", tmp_path / "fewer") == {}


@pytest.mark.parametrize(("target", "package"), [("gguf", "gguf"), ("onnx", "onnx"), ("torchao", "torchao")])
def test_of_an_exported_model(target: str, package: str, umask: int, source: Path, tmp_path: Path) -> None:
    pytest.importorskip(package)
    compress(source, tmp_path / "out", **BITS)
    hesse.export(tmp_path / "out", tmp_path / "exported.gguf", to=target)
    assert wrong(umask, tmp_path / "exported.gguf") == {}


def test_of_a_page(umask: int, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "<html></html>")
    assert wrong(umask, tmp_path / "page.html") == {}


def test_of_a_training(umask: int, tmp_path: Path) -> None:
    data = [(torch.ones(2, 3), torch.ones(2, 1))]
    settings = Training(steps=1, optimizer=lambda named: torch.optim.SGD(named, lr=0.1))
    finetune(
        nn.Sequential(nn.Linear(3, 1)),
        data,
        settings,
        loss_function=SquaredError(),
        checkpoint=tmp_path / "new" / "kept",
    )
    assert wrong(umask, tmp_path / "new") == {}


def test_of_tensors_and_curvatures(umask: int, tmp_path: Path) -> None:
    for _ in range(2):  # the second time in place of the first
        write_tensors(tmp_path / "tensors", {"weight": torch.ones(2, 2)})
        save_curvature(Gram(second_moment=torch.eye(2), tokens=1), tmp_path / "curvature")
        assert wrong(umask, tmp_path / "tensors", tmp_path / "curvature") == {}
        (tmp_path / "tensors").chmod(0o700)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curvature", "tensors"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "tensors", {"weight": torch.ones(2)})
    before = (tmp_path / "tensors").read_bytes()

    def fill(tensors: object, path: Path, header: object) -> None:
        path.write_text("half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(writer, "save_file", fill)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "tensors", {"weight": torch.zeros(2)})
    assert (tmp_path / "tensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tensors"]


def test_one_function_calls_what_ignores_the_umask() -> None:
    """`save_file`, `mkstemp` and `mkdtemp` make files and folders for their owner alone."""
    ignoring = re.compile(r"\b(save_file|mkstemp|mkdtemp|NamedTemporaryFile)\b\s*[(,\n]")
    lines = [
        (path.relative_to(PACKAGE).as_posix(), line.strip())
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if ignoring.search(line)
    ]
    assert [name for name, _ in lines] == ["checkpoints/writer.py"] * 2, lines
    assert next(line for _, line in lines if "import" not in line).startswith("save_file({name: ")
