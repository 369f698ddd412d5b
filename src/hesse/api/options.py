"""What several functions take: data, devices, and numbers with a least value."""

from pathlib import Path

import torch

from hesse.data.selection import Calibration
from hesse.errors import OptionError

Data = str | Path | list[list[int]] | None


def find_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one.

    Raises:
        OptionError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise OptionError(f"there is no device {name!r} here: use auto, cpu or cuda") from None
    return device


def calibration_of(data: Data, samples: int, length: int | None, seed: int, batch_size: int | None) -> Calibration:
    """Which tokens a run looks at.

    Raises:
        OptionError: there would be none.
    """
    at_least("--samples", samples, 1)
    at_least("--length", length, 2)
    at_least("--batch-size", batch_size, 1)
    return Calibration(data, samples, length, seed, batch_size)


def at_least(option: str, value: int | None, least: int) -> None:
    """Raise OptionError if the option was given as less than `least`."""
    if value is not None and value < least:
        raise OptionError(f"{option} is {value}, but must be at least {least}")
