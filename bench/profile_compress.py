"""Where the time of `hesse compress` goes: each phase, and in it matrix products, factorisations, loops and the rest.

    python bench/profile_compress.py MODEL [option of hesse compress]...

The command runs in this process under torch's profiler, which slows it by some percent. Prints a table in Markdown, and
the rate of the matrix products beside this machine's peak.
"""

import bisect
import functools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from machine import limits
from torch.profiler import ProfilerActivity, profile, record_function

from hesse.cli import main as command_line
from hesse.progress import Clock
from hesse.solvers.sweeps import columns, two_sided_blocks

PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mv",
    "aten::addmv_",
    "aten::dot",
    "aten::mkldnn_linear",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}
FACTORISATIONS = {"aten::linalg_cholesky_ex", "aten::linalg_solve_triangular", "aten::cholesky_inverse"}
LOOPS, PHASE = "compiled loop", "phase: "
KINDS = ("matrix products", "factorisations", LOOPS, "other operations on tensors")
OUTSIDE = "outside the phases"


def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, seen by the profiler."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return call


def watch() -> None:
    """Let the profiler see the phases and the compiled loops."""
    phase = Clock.phase

    @contextmanager
    def seen(self: Clock, name: str) -> Iterator[None]:
        with record_function(PHASE + name), phase(self, name):
            yield

    Clock.phase = seen  # type: ignore[method-assign]
    columns._walk = recorded(LOOPS, columns._walk)
    two_sided_blocks.feed_back = recorded(LOOPS, two_sided_blocks.feed_back)
    two_sided_blocks.descend = recorded(LOOPS, two_sided_blocks.descend)


class Phases:
    """Which phase runs at a time, and for how long each does; one inside another stops the outer one's clock."""

    def __init__(self, events: list[Any]) -> None:
        marks = sorted((e.time_range.start, -e.time_range.end, e.name) for e in events if e.name.startswith(PHASE))
        self.times: list[float] = []
        self.names: list[str] = []
        running: list[tuple[float, str]] = []
        for start, minus_end, name in [*marks, (float("inf"), 0.0, PHASE)]:
            while running and running[-1][0] <= start:
                end, _ = running.pop()
                self._mark(end, running[-1][1] if running else OUTSIDE)
            running.append((-minus_end, name.removeprefix(PHASE)))
            self._mark(start, running[-1][1])

    def _mark(self, time: float, name: str) -> None:
        self.times.append(time)
        self.names.append(name)

    def at(self, time: float) -> str:
        """The innermost phase at `time`."""
        place = bisect.bisect_right(self.times, time) - 1
        return self.names[place] if place >= 0 else OUTSIDE

    def seconds(self) -> dict[str, float]:
        """Of each phase."""
        total: dict[str, float] = defaultdict(float)
        for start, stop, name in zip(self.times, self.times[1:], self.names, strict=False):
            if stop < float("inf"):
                total[name] += (stop - start) / 1e6
        return total


def kind_of(name: str) -> str | None:
    """What sort of work an event is; None for a phase."""
    if name.startswith(PHASE):
        return None
    if name in PRODUCTS:
        return KINDS[0]
    return KINDS[1] if name in FACTORISATIONS else LOOPS if name == LOOPS else KINDS[3]


def main() -> None:
    """Run the command, and print where its time went."""
    watch()
    with tempfile.TemporaryDirectory() as scratch:
        out = str(Path(scratch) / "out")
        sys.argv = ["hesse", "compress", sys.argv[1], out, *sys.argv[2:]]
        said = StringIO()
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
            try:
                with redirect_stdout(said), redirect_stderr(said):
                    command_line()
            except SystemExit as end:
                if end.code:
                    raise SystemExit(said.getvalue()) from None
    events = list(profiled.events())
    phases = Phases(events)
    work: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    operations, product_seconds = 0.0, 0.0
    for event in events:
        kind = kind_of(event.name)
        if kind is not None:
            phase = phases.at(event.time_range.start)
            work[phase][kind] += event.self_cpu_time_total / 1e6
            if event.flops:
                operations += event.flops
                product_seconds += event.self_cpu_time_total / 1e6
    seconds = {name: spent for name, spent in phases.seconds().items() if name != OUTSIDE}
    whole = sum(seconds.values())
    print(
        f"| phase | seconds | share | {' | '.join(KINDS)} | Python, files |\n|---|---|---|{'---|' * (len(KINDS) + 1)}"
    )
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        parts = [work[name][kind] for kind in KINDS]
        cells = [f"{100 * part / whole:.1f} %" for part in (*parts, max(spent - sum(parts), 0.0))]
        print(f"| {name} | {spent:.2f} | {100 * spent / whole:.1f} % | {' | '.join(cells)} |")
    machine = limits()
    print(
        f"\nMatrix products ran at {operations / product_seconds / 1e9:.0f} GFLOP/s; this machine's peak is "
        f"{float(machine['gemm_float32']) / 1e9:.0f} in float32 and {float(machine['gemm_bfloat16']) / 1e9:.0f} in "
        f"bfloat16. {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}."
    )


if __name__ == "__main__":
    main()
