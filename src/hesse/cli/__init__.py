"""`hesse ...`: parse, call, print.

Packages that compute are imported inside the commands, since torch takes seconds to import.
"""

from hesse.cli.app import app, main

__all__ = ["app", "main"]
