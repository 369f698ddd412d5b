"""`hesse ...`."""

from hesse.cli import runtimes  # noqa: F401  adds its commands to the others
from hesse.cli.app import main

__all__ = ["main"]
