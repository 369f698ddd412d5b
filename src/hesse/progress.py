"""How long computations say how far they are, where their time went, and how much memory they took."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """Told of each phase as it begins and of each step in it; the command line draws bars."""

    def begin(self, phase: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def advance(self) -> None:
        """One step of the present phase is done."""

    def say(self, sentence: str) -> None:
        """Something that a person should know while the computation runs."""


class Silence:
    """A Progress that shows nothing."""

    def begin(self, phase: str, steps: int) -> None:
        """Show nothing."""

    def advance(self) -> None:
        """Show nothing."""

    def say(self, sentence: str) -> None:
        """Show nothing."""


class Clock:
    """Seconds by phase; a phase that begins inside another stops the outer one's clock until it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self._running: list[str] = []
        self._since = self._started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started


def peak_memory() -> int:
    """The most memory that this process has had at once, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # resource's figure starts from that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
