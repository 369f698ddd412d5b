"""How a command runs: what its result does not depend on, gathered once."""

from dataclasses import dataclass, field

import torch

from hesse.errors import OptionError
from hesse.networks.device import find_device
from hesse.planning.sizes import read_size
from hesse.progress import Progress, Silence


@dataclass(frozen=True)
class RunOptions:
    """Where a command runs, within what memory, and what it does about files that exist."""

    device: torch.device
    memory: int | None = None  # bytes that the process may take; None for most of what is free
    overwrite: bool = False  # replace OUT
    restart: bool = False  # lose what an unfinished run to OUT has done
    dry_run: bool = False  # say what the run would take, and write nothing
    progress: Progress = field(default_factory=Silence)


def run_options(
    device: str = "auto",
    memory: str | int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RunOptions:
    """Return the options as a public function takes them.

    Raises:
        OptionError: there is no such device, or `memory` is no size.
    """
    limit = bytes_of(memory) if isinstance(memory, str) else memory
    return RunOptions(find_device(device), limit, overwrite, restart, dry_run, progress or Silence())


def bytes_of(text: str) -> int:
    """Return a number of bytes from text such as 8GiB.

    Raises:
        OptionError: the text is no size.
    """
    size = read_size(text)
    if size is None:
        raise OptionError(f"--memory is {text!r}: give bytes such as 8GiB or 500MB")
    return int(size)
