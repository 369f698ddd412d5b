"""`hesse ...`."""

from hesse.cli import blocks, compress, cut, measure, repair, rotate, runtimes  # noqa: F401  (they add their commands)
from hesse.cli.app import app, main

__all__ = ["app", "main"]
