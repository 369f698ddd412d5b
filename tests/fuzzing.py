"""What the fuzz tests share: values of any kind, a folder a try, and what a reader may do with them."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from hesse.errors import HesseError, printable

LIMITED = settings(max_examples=60, deadline=20_000, derandomize=True, suppress_health_check=list(HealthCheck))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**80),
    st.floats(),
    st.text(max_size=8),
    st.just("\ud800"),
)
JSON: SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def survives(read: Callable[[], object], kind: type[HesseError]) -> None:
    """Check that `read` returns, or raises an error of `kind` that can be printed on one line."""
    try:
        read()
    except kind as error:
        printable(str(error)).encode()
