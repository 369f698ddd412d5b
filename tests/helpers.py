"""What several tests need around the tiny models: data on disk, dense twins, and the command line in this process."""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hesse
import tiny_models
from hesse.checkpoints.journal import Journal
from hesse.cli import main
from hesse.errors import OptionError
from hesse.formats import open_checkpoint, packed
from hesse.jobs.report import CompressionReport
from hesse.result import Result

WEIGHTS = "model.safetensors"
IDS = tiny_models.random_ids(8, 32)
OTHER_IDS = tiny_models.random_ids(4, 24, seed=7)


def fast_first(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Parameters for `pytest.mark.parametrize` of which those after the first `fast` are marked slow."""
    values = list(values)
    rest = [value if isinstance(value, tuple) else (value,) for value in values[fast:]]
    return [*values[:fast], *(pytest.param(*value, marks=pytest.mark.slow) for value in rest)]


@contextmanager
def skipped_if_too_old() -> Iterator[None]:
    """Skip the test if it is refused since the transformers that is installed would read wrong weights."""
    try:
        yield
    except OptionError as error:
        if packed.LOADER_UNPACKS or "update it" not in str(error):
            raise
        pytest.skip(str(error))


def compress(source: Path, out: Path, **options: Any) -> CompressionReport:
    """Compress with 8 samples of 32 random tokens, and options of `hesse.Options` beside those of `compress`."""
    names = hesse.Options.__dataclass_fields__
    chosen = {name: options.pop(name) for name in list(options) if name in names}
    if "recipe" not in options:
        options["options"] = hesse.Options(**chosen)
    with skipped_if_too_old():
        return hesse.compress(source, out, **{"data": IDS, **options}).report


def kill_after(steps: int | None) -> None:
    """Kill this process like the system would once it has recorded that many steps; with None never."""
    if steps is None:
        return
    record, left = Journal.record, [steps]

    def counted(self: Journal, step: str, content: dict[str, Any], files: Any = ()) -> None:
        record(self, step, content, files)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.record = counted  # type: ignore[method-assign]


def output(model: torch.nn.Module, ids: list[list[int]] | Tensor = OTHER_IDS) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        result = model(input_ids=torch.as_tensor(ids))
    return result.logits if "logits" in result else result.last_hidden_state


def twin(compressed: Path, folder: Path, source: Path) -> Path:
    """A dense checkpoint of what `compressed` decodes to, with the config of the model it was made from."""
    checkpoint = open_checkpoint(compressed)
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.read(checkpoint.names()).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def dense_tensors(folder: Path) -> dict[str, Tensor]:
    """All dense tensors that a checkpoint of any kind stands for."""
    checkpoint = open_checkpoint(folder)
    return checkpoint.read(checkpoint.names())


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Let `edit` change the tensors of a dense checkpoint in one file."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def sha256(folder: Path) -> str:
    """Fingerprint of a checkpoint in one file."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def write_ids(path: Path, ids: list[list[int]] = IDS) -> Path:
    """Ready tokens as a .jsonl file."""
    path.write_text("".join(json.dumps({"input_ids": sample}) + "\n" for sample in ids), encoding="utf-8")
    return path


def left_over(folder: Path, out: str = "out") -> list[str]:
    """What a run that failed left of OUT, and of the folder it was to be made in."""
    return sorted(path.name for path in folder.iterdir() if path.name == out or path.name.startswith(f".{out}."))


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line on standard error."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, self.stderr
        return lines[0]


class CommandLine:
    """`hesse ...` in this process: starting another costs seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> Ran:
        """Run it as the shell would."""
        self._monkeypatch.setattr(sys, "argv", ["hesse", *map(str, arguments)])
        self._capsys.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
        printed = self._capsys.readouterr()
        return Ran(int(code), printed.out, printed.err)


class ModuleResult:
    """The report of compressing a module, and the changed module as `module`."""

    def __init__(self, result: Result[Any]) -> None:
        self.report, self.module = result.report, result.model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.report, name)


def compress_module(model: torch.nn.Module, data: Any, **options: Any) -> Any:
    """Compress a module in memory."""
    return ModuleResult(hesse.compress(model, data=data, **options))
