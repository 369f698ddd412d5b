"""Run options of a command, which do not affect its result."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hesse.errors import OptionError
from hesse.networks.device import find_device
from hesse.planning.sizes import read_size
from hesse.progress import Progress, Silence


@dataclass(frozen=True)
class RunOptions:
    """Device and memory of a command, and its treatment of existing files."""

    device: torch.device
    memory: int | None = None  # limit of the process in bytes; None for most of the free memory
    overwrite: bool = False  # replace OUT
    restart: bool = False  # discard the work of an unfinished run to OUT
    dry_run: bool = False  # estimate the resources of the run, and write nothing
    progress: Progress = field(default_factory=Silence)


def run_options(
    device: str = "auto",
    memory: str | int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RunOptions:
    """Return the run options from the arguments of a public function.

    Raises:
        OptionError: there is no such device, or `memory` is not a size.
    """
    limit = bytes_of(memory) if isinstance(memory, str) else memory
    return RunOptions(find_device(device), limit, overwrite, restart, dry_run, progress or Silence())


def check_model(model: object) -> None:
    """Check that a model is named as one on disk.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(model, str | Path):
        raise OptionError(f"the model is {type(model).__name__}: give a model folder, `default`, or a hub id")


def bytes_of(text: str) -> int:
    """Return a number of bytes from text such as 8GiB.

    Raises:
        OptionError: the text is not a size.
    """
    size = read_size(text)
    if size is None:
        raise OptionError(f"--memory is {text!r}: give bytes such as 8GiB or 500MB")
    return int(size)
