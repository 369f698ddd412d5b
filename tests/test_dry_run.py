"""A dry run says what a run takes, before any work, and writes nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hesse
import tiny_models
from helpers import IDS, CommandLine, compress, fast_first, left_over, write_ids
from hesse.errors import OptionError
from hesse.result import ForecastReport

COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "compress": ("compress", {"options": hesse.Options(bits=4, group_size=32)}),
    "compress by a fisher": ("compress", {"method": "squeezellm"}),
    "compress to a low rank": ("compress", {"method": "activation-svd", "options": hesse.Options(rank=8)}),
    "rotate": ("rotate", {}),
    "hidden units": ("prune", {"what": "hidden", "keep": 0.5}),
    "blocks": ("prune", {"what": "blocks", "keep": 0.5}),
    "blocks shared": ("prune", {"what": "blocks", "keep": 0.75, "method": "flexigpt", "rank": 4}),
    "repair to an adapter": ("repair", {"rank": 4, "curvature": "kronecker"}),
    "repair to a model": ("repair", {"rank": 4, "format": "dense"}),
    "estimate": ("estimate", {"curvatures": ("gram", "kronecker")}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model of four blocks, the model compressed, and token ids for commands that want a file."""
    folder = tmp_path_factory.mktemp("forecast")
    (folder / "made").mkdir()
    model = tiny_models.save("llama", folder / "made", num_hidden_layers=4)
    compress(model, folder / "compressed", method="rtn", bits=3, group_size=32)
    return model, folder / "compressed", write_ids(folder / "ids.jsonl")


def run(name: str, folders: tuple[Path, ...], out: Path, **changed: Any) -> Any:
    """Run a command in this process."""
    model, compressed, ids = folders
    verb, options = COMMANDS[name]
    models = (model, compressed) if verb == "repair" else (model,)
    return getattr(hesse, verb)(*models, out, **{"data": ids if verb == "estimate" else IDS, **options, **changed})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_says_the_bytes_of_out_and_writes_nothing(
    name: str, folders: tuple[Path, ...], tmp_path: Path
) -> None:
    forecast = run(name, folders, tmp_path / "out", dry_run=True).report
    assert isinstance(forecast, ForecastReport)
    assert left_over(tmp_path) == []
    done = run(name, folders, tmp_path / "out").report
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    headers = 16_000  # of safetensors files, which weigh something in tiny models only
    slack = 1.2 if name == "estimate" else 1.05  # layers with the same inputs have one Gram, as the run finds out
    assert written - headers <= forecast.out_bytes <= slack * written + headers
    assert forecast.disk_bytes >= written
    assert (forecast.verb, forecast.model, forecast.out) == (done.verb, done.model, done.out)
    assert forecast.bytes_before == done.bytes_before
    assert forecast.seconds["total"] > 0
    assert json.loads(json.dumps(forecast.to_dict())) == forecast.to_dict()


def test_more_samples_take_longer(folders: tuple[Path, ...], tmp_path: Path) -> None:
    data = [tiny_models.random_ids(count, 32) for count in (8, 800)]
    few, many = (
        run("hidden units", folders, tmp_path / "out", data=ids, samples=len(ids), batch_size=4, dry_run=True).report
        for ids in data
    )
    assert many.seconds["total"] > 3 * few.seconds["total"]
    assert many.disk_bytes > few.disk_bytes
    assert many.memory_bytes > few.memory_bytes


def test_a_budget_says_its_own_size(folders: tuple[Path, ...], tmp_path: Path) -> None:
    report = run("compress", folders, tmp_path / "out", method="gptq", options=None, size="60%", dry_run=True).report
    assert report.out_bytes == int(0.6 * report.bytes_before)
    assert any("the time to plan" in note for note in report.notes)


def test_a_dry_run_refuses_what_the_run_would_refuse(folders: tuple[Path, ...], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--keep 0\.99 of"):
        run("hidden units", folders, tmp_path / "out", keep=0.99, dry_run=True)
    with pytest.raises(OptionError, match="--memory 1MiB is not enough"):
        run("compress", folders, tmp_path / "out", memory="1MiB", dry_run=True)
    assert left_over(tmp_path) == []


def test_the_command_line_prints_a_dry_run(
    folders: tuple[Path, ...], hesse_command: CommandLine, tmp_path: Path
) -> None:
    arguments = ("rotate", folders[0], tmp_path / "out", "--data", folders[2], "--dry-run")
    ran = hesse_command(*arguments)
    assert ran.code == 0
    assert "nothing was written" in ran.stdout
    ran = hesse_command(*arguments, "--json")
    assert json.loads(ran.stdout)["memory_bytes"] > 0
    assert left_over(tmp_path) == []


PEAK = """
import json, sys, torch
import test_dry_run
from pathlib import Path
from hesse.progress import peak_memory

torch.set_num_threads(1)
name, model, compressed, ids, out = sys.argv[1:]
folders = Path(model), Path(compressed), Path(ids)
settings = json.loads(sys.stdin.read())
bound = test_dry_run.run(name, folders, Path(out), dry_run=True, **settings).report.memory_bytes
test_dry_run.run(name, folders, Path(out), **settings)
print(bound, peak_memory())
"""


@pytest.mark.parametrize("name", fast_first([name for name in COMMANDS if name != "compress by a fisher"]))
def test_no_run_takes_more_memory_than_its_dry_run_says(
    name: str, folders: tuple[Path, ...], tmp_path: Path, wide: Callable[[], tuple[Path, Path]]
) -> None:
    model, compressed = wide()
    ids = write_ids(tmp_path / "ids.jsonl", tiny_models.random_ids(64, 128))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{Path(hesse.__file__).parents[1]}:{Path(__file__).parent}"
    command = [sys.executable, "-c", PEAK, name, str(model), str(compressed), str(ids), str(tmp_path / "out")]
    settings = json.dumps({"data": str(ids)})
    done = subprocess.run(command, input=settings, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    bound, peak = map(int, done.stdout.split()[-2:])
    assert peak <= bound


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, Path]]:
    """A model of a hundred megabytes, and the model compressed, made when they are needed."""
    made: list[tuple[Path, Path]] = []

    def folders() -> tuple[Path, Path]:
        if not made:
            folder = tmp_path_factory.mktemp("wide")
            (folder / "made").mkdir()
            sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
            model = tiny_models.save("llama", folder / "made", max_position_embeddings=128, **sizes)
            compress(model, folder / "compressed", method="rtn", bits=3, group_size=64)
            made.append((model, folder / "compressed"))
        return made[0]

    return folders
