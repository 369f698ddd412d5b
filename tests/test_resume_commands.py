"""Every command that writes a folder goes on after kill -9, at any note or moment, to the same bytes."""

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

import hesse
import tiny_models
from helpers import IDS, compress, kill_after, left_over, write_ids
from hesse.checkpoints import work_folder
from hesse.checkpoints.journal import Journal
from hesse.checkpoints.work_folder import WorkFolder
from hesse.errors import OutputError

REPORTS = ("hesse-report.json", "statistics.json")
VOLATILE = ("seconds", "peak_rss_bytes", "out")
# What each command is asked, and with what it is refused over an unfinished run.
COMMANDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "rotate": ("rotate", {"kind": "kurtail"}, {"kind": "hadamard"}, "kind"),
    "blocks": ("prune", {"what": "blocks", "keep": 0.5}, {"keep": 0.75}, "options"),
    "blocks by score": ("prune", {"what": "blocks", "keep": 0.5, "method": "quadratic"}, {"seed": 1}, "seed"),
    "blocks shared": (
        "prune",
        {"what": "blocks", "keep": 0.75, "method": "flexigpt", "rank": 4},
        {"rank": 5},
        "options",
    ),
    "hidden units": ("prune", {"what": "hidden", "keep": 0.5}, {"keep": 0.25}, "options"),
    "repair to an adapter": ("repair", {"rank": 4, "curvature": "kronecker"}, {"rank": 5}, "options"),
    "repair to a model": ("repair", {"rank": 4, "format": "dense"}, {"format": "adapter"}, "options"),
    "estimate": ("estimate", {"curvatures": ("gram", "kronecker", "fisher")}, {"curvatures": ("gram",)}, "curvatures"),
    "estimate a Gram": ("estimate", {"curvatures": ("gram",)}, {"seed": 1}, "seed"),
}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["helpers", "hesse.jobs.compress", "hesse.jobs.repair", "hesse.jobs.estimate"])
Sources = tuple[Path, ...]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model of four blocks, the model compressed, and token ids for commands that want a file."""
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "made").mkdir()
    model = tiny_models.save("llama", folder / "made", num_hidden_layers=4)
    compress(model, folder / "compressed", method="rtn", bits=3, group_size=32)
    return model, folder / "compressed", write_ids(folder / "ids.jsonl")


def run(name: str, folders: Sources, out: Path, **changed: Any) -> Any:
    """Run a command in this process."""
    model, compressed, ids = folders
    verb, options, *_ = COMMANDS[name]
    models = (model, compressed) if verb == "repair" else (model,)
    data = ids if verb == "estimate" else IDS
    return getattr(hesse, verb)(*models, out, **{"data": data, "batch_size": 3, **options, **changed})


def killed(name: str, folders: Sources, out: Path, die_after: int | None) -> None:
    """Run a command, and kill this process like the system would once `die_after` steps are noted."""
    torch.set_num_threads(1)
    kill_after(die_after)
    run(name, folders, out)


def ends(name: str, folders: Sources, out: Path, die_after: int | None = None, seconds: float | None = None) -> bool:
    """Return True if a process that runs the command comes to its end."""
    process = PROCESSES.Process(target=killed, args=(name, folders, out, die_after))
    process.start()
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def files(out: Path) -> dict[str, bytes]:
    """Every file of a result by name, and its report without seconds and memory."""
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in REPORTS}
    for path in (out / name for name in REPORTS if (out / name).exists()):
        report = json.loads(path.read_text())
        found[path.name] = json.dumps({k: v for k, v in report.items() if k not in VOLATILE}).encode()
    assert any(name in found for name in REPORTS)
    return found


@pytest.fixture(scope="module")
def undisturbed(folders: Sources, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What a command writes that nothing interrupts."""
    found: dict[str, dict[str, bytes]] = {}

    def of(name: str) -> dict[str, bytes]:
        if name not in found:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            assert ends(name, folders, out)
            found[name] = files(out)
        return found[name]

    return of


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on_to_the_same_bytes(
    name: str, folders: Sources, undisturbed: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    """Killed after one to three notes each time; every other time the newest file is cut, as by a power failure."""
    deaths, out = 0, tmp_path / "out"
    while not ends(name, folders, out, die_after=1 + max(deaths - 1, 0) % 3):
        deaths += 1
        assert deaths < 60
        assert not out.exists()
        if deaths % 2:
            left = [p for p in (tmp_path / ".out.unfinished").rglob("*") if p.is_file() and p.name != work_folder.LOCK]
            cut = max(left, key=lambda path: path.stat().st_mtime_ns)
            os.truncate(cut, cut.stat().st_size // 2)
    assert deaths >= 2
    assert files(out) == undisturbed(name)
    assert left_over(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["hidden units", "repair to an adapter", "estimate"])
def test_a_command_may_be_killed_at_any_moment(
    name: str, folders: Sources, undisturbed: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    generator, out = random.Random(name), tmp_path / "out"
    started = time.monotonic()
    assert ends(name, folders, tmp_path / "whole")
    whole = time.monotonic() - started
    for _ in range(4):
        if ends(name, folders, out, seconds=generator.uniform(0.2, 0.9) * whole) or out.exists():
            break
    else:
        assert ends(name, folders, out)
    assert files(out) == undisturbed(name)
    assert left_over(tmp_path, "out") == ["out"]


@pytest.mark.parametrize("name", COMMANDS)
def test_another_command_or_request_is_refused_by_name(
    name: str,
    folders: Sources,
    undisturbed: Callable[[str], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, changed, what = COMMANDS[name]
    out, record, left = tmp_path / "out", Journal.record, [3]

    def stop(self: Journal, step: str, content: dict[str, Any], files: Any = ()) -> None:
        record(self, step, content, files)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", stop)
        with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
            run(name, folders, out)
    with pytest.raises(OutputError, match=rf"differs from this one in its .*{what}.*: give --restart"):
        run(name, folders, out, **changed)
    other = "rotate" if not name.startswith("rotate") else "hidden units"
    with pytest.raises(OutputError, match="differs from this one in its command"):
        run(other, folders, out)
    shutil.copytree(tmp_path / ".out.unfinished", tmp_path / "kept")
    run(name, folders, out)
    assert files(out) == undisturbed(name)
    shutil.rmtree(out)
    (tmp_path / "kept").rename(tmp_path / ".out.unfinished")
    run(name, folders, out, restart=True)
    assert files(out) == undisturbed(name)
    assert left_over(tmp_path) == ["out"]


def test_a_folder_without_a_finished_step_is_begun_anew_by_any_command(
    folders: Sources, undisturbed: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert not ends("estimate a Gram", folders, out, die_after=1)  # the identity of the run is the first record
    assert (tmp_path / ".out.unfinished").is_dir()
    run("hidden units", folders, out)
    assert files(out) == undisturbed("hidden units")
    assert left_over(tmp_path) == ["out"]


def test_an_estimate_that_was_killed_behind_its_index_counts_the_same_bytes(
    folders: Sources, undisturbed: Callable[[str], dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(self: WorkFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run("estimate", folders, out)
    run("estimate", folders, out)
    assert files(out) == undisturbed("estimate")
