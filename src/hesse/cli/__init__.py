"""`hesse ...`."""

from hesse.cli import compress, cut, measure, prune, repair, rotate, runtimes  # noqa: F401  (they add their commands)
from hesse.cli.app import app, main

__all__ = ["app", "main"]
