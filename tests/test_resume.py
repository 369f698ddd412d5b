"""A run that was cut short anywhere goes on from there to the same bytes, and never with another run's work."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from helpers import IDS, CommandLine, change, compress, fast_first, kill_after, left_over, write_ids
from hesse.checkpoints import tensor_store, work_folder
from hesse.checkpoints.journal import Journal
from hesse.errors import OptionError, OutputError

FolderOf = Callable[[str], Path]
# Everything but where its time went, which is told in hesse-report.json.
METHODS: dict[str, dict[str, Any]] = {
    "kronecker": {"bits": 4, "group_size": 32},
    "gptq": {"bits": 3, "group_size": 32},
    "rtn": {"bits": 4, "group_size": 32},
    "sparsegpt": {"sparsity": "2:4"},
    "activation-svd": {"rank": 8},
    "squeezellm": {},
    "rsq": {"bits": 3, "group_size": 32},
    "aptq": {"bits": 3, "group_size": 32},
    "kurtail": {"bits": 3, "group_size": 32},
    "qqq": {"group_size": 32},
    "planned": {"mean_bits": 3.5},
}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["helpers", "hesse.jobs.compress"])


def settings(name: str) -> dict[str, Any]:
    return {**METHODS[name], **({} if name == "planned" else {"method": name})}


def files(out: Path) -> dict[str, bytes]:
    """What a loader reads, and the account of the run without its seconds and its memory."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "hesse-report.json"}
    report = json.loads((out / "hesse-report.json").read_text())
    kept = {key: value for key, value in report.items() if key not in ("seconds", "peak_rss_bytes", "out")}
    return {**found, "hesse-report.json": json.dumps(kept).encode()}


def in_a_process(source: Path, out: Path, name: str, die_after: int | None) -> None:
    """Compress, and kill this process like the system would once `die_after` steps are noted."""
    torch.set_num_threads(1)
    kill_after(die_after)
    compress(source, out, **settings(name))


def run(source: Path, out: Path, name: str, die_after: int | None = None, seconds: float | None = None) -> bool:
    """Whether a process that compresses came to its end."""
    process = PROCESSES.Process(target=in_a_process, args=(source, out, name, die_after))
    process.start()
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def newest(folder: Path) -> Path:
    """The file that was written last, but for the lock."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != work_folder.LOCK]
    return max(found, key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("name", fast_first(["kronecker", "planned"]))
def test_a_killed_run_goes_on_to_the_same_bytes(name: str, family_folder: FolderOf, tmp_path: Path) -> None:
    """Killed after a few noted steps each time; every other time the newest file is cut, as by a power failure."""
    source, generator = family_folder("llama"), random.Random(name)
    compress(source, tmp_path / "undisturbed", **settings(name))
    deaths = 0
    while not run(source, tmp_path / "out", name, die_after=generator.randint(2, 5)):
        deaths += 1
        assert deaths < 40
        assert not (tmp_path / "out").exists()
        if deaths % 2:
            cut = newest(tmp_path / ".out.unfinished")
            os.truncate(cut, cut.stat().st_size // 2)
    assert deaths > 2
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert left_over(tmp_path) == ["out"]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("kronecker", "planned")])
@pytest.mark.parametrize("blocks", fast_first([1, 0]))
def test_every_method_goes_on(
    name: str, blocks: int, family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, record = family_folder("llama"), Journal.record
    compress(source, tmp_path / "undisturbed", **settings(name))

    def stop(self: Journal, step: str, content: dict[str, Any], files: Any = ()) -> None:
        record(self, step, content, files)
        if step == f"block-{blocks}":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "out", **settings(name))
    compress(source, tmp_path / "out", **settings(name))
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_may_be_killed_at_any_moment(half_folder: FolderOf, tmp_path: Path) -> None:
    source, generator = half_folder("llama"), random.Random(0)
    compress(source, tmp_path / "undisturbed", **settings("kronecker"))
    started = time.monotonic()
    assert run(source, tmp_path / "whole", "kronecker")
    whole = time.monotonic() - started
    for number in range(2):
        out = tmp_path / f"out{number}"
        for _ in range(5):
            ended = run(source, out, "kronecker", seconds=generator.uniform(0.2, 0.9) * whole)
            if ended or out.exists():  # a run may be killed when all is done and its process has not ended yet
                break
        else:
            assert run(source, out, "kronecker")
        assert files(out) == files(tmp_path / "undisturbed")
        assert left_over(tmp_path, out.name) == [out.name]


def test_a_full_disk_keeps_what_is_done(
    family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family_folder("llama")
    compress(source, tmp_path / "undisturbed", **settings("gptq"))
    append, calls = tensor_store.TensorFile.append, [0]

    def full(self: tensor_store.TensorFile, tensor: torch.Tensor) -> int:
        calls[0] += 1
        if calls[0] == 6:
            raise OutputError("the disk is full")
        return append(self, tensor)

    monkeypatch.setattr(tensor_store.TensorFile, "append", full)
    with pytest.raises(OutputError, match="the disk is full; the finished part is kept, and the same command resumes"):
        compress(source, tmp_path / "out", **settings("gptq"))
    assert left_over(tmp_path) == [".out.unfinished"]
    compress(source, tmp_path / "out", **settings("gptq"))
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert left_over(tmp_path) == ["out"]


def test_a_disk_that_refuses_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="the disk is full; free some space"):
        journal.record("step", {})


def cut_short(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Leave a run unfinished after its first block."""

    def stop(self: Any, index: int, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hesse.jobs.job.BlockSteps.note", stop)
        with pytest.raises(KeyboardInterrupt, match="kept"):
            compress(source, out, **{**settings("gptq"), **options})


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"bits": 4}, "recipe"),
        ({"data": IDS[:4]}, "data"),
        ({"seed": 1}, "seed"),
        ({"format": "dense"}, "settings"),
    ],
)
def test_another_run_is_refused(
    changed: dict[str, Any],
    what: str,
    family_folder: FolderOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = family_folder("llama"), tmp_path / "out"
    cut_short(source, out, monkeypatch)
    with pytest.raises(OutputError, match=rf"differs from this one in its {what}: .* or another OUT$"):
        compress(source, out, **{**settings("gptq"), **changed})
    assert left_over(tmp_path) == [".out.unfinished"]
    report = compress(source, out, restart=True, **{**settings("gptq"), **changed})
    assert report.layers
    assert left_over(tmp_path) == ["out"]


def test_a_changed_model_is_refused(family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(family_folder("llama"), tmp_path / "model")
    cut_short(source, tmp_path / "out", monkeypatch)
    change(source, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    with pytest.raises(OutputError, match="in its model: give --restart"):
        compress(source, tmp_path / "out", **settings("gptq"))


def test_changed_data_and_versions_are_refused(
    family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_ids(tmp_path / "ids.jsonl")
    cut_short(family_folder("llama"), tmp_path / "out", monkeypatch, data=data)
    write_ids(data, IDS[:4])
    with pytest.raises(OutputError, match="in its data: give --restart"):
        compress(family_folder("llama"), tmp_path / "out", **{**settings("gptq"), "data": data})
    write_ids(data)
    monkeypatch.setattr("hesse.jobs.identity.versions", lambda: {"torch": "9.9"})
    with pytest.raises(OutputError, match="in its versions of Hesse and its libraries: give --restart"):
        compress(family_folder("llama"), tmp_path / "out", **{**settings("gptq"), "data": data})


def test_a_mistake_of_the_user_leaves_nothing_to_resume(family_folder: FolderOf, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be reached"):
        compress(family_folder("llama"), tmp_path / "new" / "out", mean_bits=0.1)
    assert not (tmp_path / "new").exists()


def test_a_mistake_when_a_run_is_taken_up_loses_nothing(
    family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(family_folder("llama"), tmp_path / "out", monkeypatch)
    with pytest.raises(OptionError, match="--memory 1MiB is not enough"):
        compress(family_folder("llama"), tmp_path / "out", **settings("gptq"), memory="1MiB")
    assert left_over(tmp_path) == [".out.unfinished"]
    compress(family_folder("llama"), tmp_path / "out", **settings("gptq"))
    assert left_over(tmp_path) == ["out"]


def test_two_runs_do_not_write_one_folder(family_folder: FolderOf, tmp_path: Path) -> None:
    with work_folder.work_folder(tmp_path / "out") as work:
        work.begin({}, 0, restart=False)
        with pytest.raises(OutputError, match="another run is writing"):
            compress(family_folder("llama"), tmp_path / "out", **settings("rtn"))


def test_a_link_in_place_of_the_unfinished_folder_is_not_followed(family_folder: FolderOf, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / ".out.unfinished").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="is a link"):
        compress(family_folder("llama"), tmp_path / "out", **settings("rtn"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_model_that_was_being_replaced_is_not_lost(family_folder: FolderOf, tmp_path: Path) -> None:
    compress(family_folder("llama"), tmp_path / "out", **settings("rtn"))
    (tmp_path / "out").rename(tmp_path / ".out.replaced")  # what a process that was killed between two renames leaves
    with pytest.raises(OutputError, match="exists"):
        compress(family_folder("llama"), tmp_path / "out", **settings("rtn"))
    assert left_over(tmp_path) == ["out"]


def test_the_command_line_says_what_is_kept(
    family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hesse_command: CommandLine
) -> None:
    data = write_ids(tmp_path / "ids.jsonl", tiny_models.random_ids(8, 32))
    arguments = ("compress", family_folder("llama"), tmp_path / "out", "--data", data, "--bits", "4", "--json")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hesse.jobs.job.BlockSteps.note", stop)
        ran = hesse_command(*arguments)
    assert ran.code == 130
    kept = "was not written; the finished part is kept, and the same command resumes."
    assert ran.error == f"Interrupted: {tmp_path / 'out'} {kept}"
    assert hesse_command(*arguments).code == 0
    assert left_over(tmp_path) == ["out"]
