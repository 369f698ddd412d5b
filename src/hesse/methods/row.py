"""A row of the table of methods, whatever carries it out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A named triple curvature × constraint × solver, its source, what it needs, and the call that runs it.

    `constraint` has the parts that the method always has; `optional` those that an option may add.
    """

    name: str
    curvature: str
    constraint: tuple[str, ...]
    solver: str
    source: str
    needs: str
    run: str
    optional: tuple[str, ...] = ()
    basis: str = "own"
    rewrite: str | None = None  # how the model is rewritten before, its function unchanged
