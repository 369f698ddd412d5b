"""Progress, times and peak memory of long computations."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """Receiver of a computation's phases and steps; the command line draws bars."""

    def begin(self, phase: str, steps: int) -> None:
        """Begin a phase of `steps` steps."""

    def advance(self) -> None:
        """Finish one step of the present phase."""

    def say(self, sentence: str) -> None:
        """Show a message during the computation."""


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
        """Charge the time inside to the phase `name`."""
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
        """Return the seconds since the clock was created."""
        return time.perf_counter() - self._started


def peak_memory() -> int:
    """Return the peak memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # resource's figure includes that of the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
