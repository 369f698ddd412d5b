"""Keep the libraries of the Hugging Face hub from the network, so that nothing is downloaded unasked."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub.constants

# Packages that keep a setting of their own, which they read at each use.
FLAGS = {"datasets": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "evaluate": ("HF_EVALUATE_OFFLINE",)}


@contextmanager
def without_network() -> Iterator[None]:
    """Let the libraries that are imported read their local caches only; they raise errors of their own for the rest."""
    places: list[tuple[Any, str]] = [(huggingface_hub.constants, "HF_HUB_OFFLINE")]
    for package, flags in FLAGS.items():
        config = getattr(sys.modules.get(package), "config", None)
        places += [(config, flag) for flag in flags if hasattr(config, flag)]
    before = [(config, flag, getattr(config, flag)) for config, flag in places]
    try:
        for config, flag in places:
            setattr(config, flag, True)
        yield
    finally:
        for config, flag, value in before:
            setattr(config, flag, value)
