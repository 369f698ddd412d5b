"""Device that a network runs on."""

import torch

from hesse.errors import OptionError


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU if there is one.

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
