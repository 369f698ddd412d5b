"""`hesse ...`."""

from hesse.cli.app import main

__all__ = ["main"]
