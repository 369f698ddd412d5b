"""What compressing 7, 70 and 405 billion parameters takes, on paper: FLOPs, bytes, disk and time, by phase.

    python bench/scaling.py [--method kronecker]

Prints the tables of docs/scaling.md. Rates of the CPU machine are measured (docs/benchmarks.md, bench/memory.py); those
of the H200 are its data sheet times `OF_PEAK`, and of the sweeps a count of instructions: no GPU has run Hesse yet.
"""

import argparse
from dataclasses import dataclass

SAMPLES, LENGTH = 128, 2048
TOKENS = SAMPLES * LENGTH
FACTOR_TOKENS, FACTOR_TOKENS_PER_OUTPUT = 8192, 8
PRODUCTS = 11  # with the Kronecker curvature, for each weight that is rounded: prices and refits
ONE_SIDED_PRODUCTS = 5  # with the Gram: half of one in the sweep, and the costs of four changes by half products
OF_PEAK = 0.5


@dataclass(frozen=True)
class Model:
    """A Llama."""

    name: str
    blocks: int
    width: int
    inner: int
    keys: int  # outputs of the key projection
    vocabulary: int

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(out, in) of a block's linear layers."""
        width, inner = self.width, self.inner
        attention = [(width, width), (self.keys, width), (self.keys, width), (width, width)]
        return [*attention, (inner, width), (inner, width), (width, inner)]

    @property
    def block_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.layers)

    @property
    def inputs(self) -> list[int]:
        """Widths of the inputs that layers share."""
        return [self.width, self.width, self.width, self.inner]


@dataclass(frozen=True)
class Machine:
    """Rates in operations and bytes a second, as reached."""

    name: str
    half: float  # products in bfloat16
    single: float  # products in float32
    sweep: float  # weights times columns (or rows) that a sweep takes on, a second
    disk: float
    processes: int = 1
    on_gpu: bool = True


MODELS = (
    Model("7B", 32, 4096, 11008, 4096, 32000),
    Model("70B", 80, 8192, 28672, 1024, 128256),
    Model("405B", 126, 16384, 53248, 1024, 128256),
)
MACHINES = (
    Machine("2 threads of an EPYC", 2.0e11, 1.5e11, 4.5e9, 1e9, on_gpu=False),
    Machine("one H200", OF_PEAK * 989e12, OF_PEAK * 67e12, 1.4e11, 5e9),
    Machine("eight H200", OF_PEAK * 989e12, OF_PEAK * 67e12, 1.4e11, 5e9, 8),
)


def phases(model: Model, method: str, machine: Machine) -> dict[str, tuple[float, float]]:
    """Operations and seconds of each phase, of the whole run."""
    count, weights, tokens = model.blocks, model.block_weights, TOKENS
    kronecker = method == "kronecker"
    widest = max(rows for rows, _ in model.layers)
    probed = max(FACTOR_TOKENS, FACTOR_TOKENS_PER_OUTPUT * widest) if kronecker else 2 * LENGTH
    attention = 2 * LENGTH * model.width
    forward = count * 2 * (weights + attention / 2)
    found: dict[str, tuple[float, float]] = {}

    def add(name: str, operations: float, rate: float, shared: bool = True) -> None:
        found[name] = (operations, operations / rate / (machine.processes if shared else 1))

    add("calibrate", forward * tokens, machine.half)
    # A GPU adds exact products of 16-bit numbers in float32; a CPU multiplies in float32.
    gram_rate = machine.half if machine.on_gpu else machine.single
    add("Grams", count * tokens * sum(n**2 for n in model.inputs), gram_rate)
    add("forward and backward pass, dense model", 3 * forward * probed, machine.half)
    squares = sum(rows**2 for rows, _ in model.layers) if kronecker else 0
    add("output factors", count * probed * squares, gram_rate)
    factoring = count * sum(n**3 for n in model.inputs)
    if kronecker:
        factoring += count * sum(rows**3 for rows, _ in model.layers)
        products = count * sum(2 * PRODUCTS * (r * r * c + r * c * c) for r, c in model.layers)
        add("products of the solver", factoring + products, machine.single, shared=False)
        add("sweeps", count * sum(r * c * (r + c) / 2 for r, c in model.layers), machine.sweep, shared=False)
    else:
        products = count * sum(ONE_SIDED_PRODUCTS * r * c * c for r, c in model.layers)
        add("products of the solver", factoring + products, machine.single)
    moved = count * (2.5 * weights * 2 + 4 * tokens * model.width * 2 + 2 * probed * model.width * 2 + 8 * squares)
    add("disk", moved, machine.disk)
    return found


def disk(model: Model, method: str) -> dict[str, float]:
    """Bytes on disk while it runs, besides the model."""
    kronecker = method == "kronecker"
    widest = max(rows for rows, _ in model.layers)
    probed = max(FACTOR_TOKENS, FACTOR_TOKENS_PER_OUTPUT * widest) if kronecker else 2 * LENGTH
    squares = sum(rows**2 for rows, _ in model.layers) if kronecker else 0
    return {
        "result": model.blocks * model.block_weights * 0.53 + 4 * model.vocabulary * model.width,
        "hidden states": 2 * 2 * TOKENS * model.width,
        "inputs of the backward pass": 2.0 * model.blocks * probed * model.width,
        "output factors": 4.0 * model.blocks * squares,
    }


def shown(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def main() -> None:
    """Print the tables of one method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("gptq", "kronecker"), default="kronecker")
    method = parser.parse_args().method
    print("| model | phase | operations | " + " | ".join(machine.name for machine in MACHINES) + " |")
    print("|---" * (3 + len(MACHINES)) + "|")
    for model in MODELS:
        columns = [phases(model, method, machine) for machine in MACHINES]
        for name in columns[0]:
            cells = " | ".join(shown(column[name][1]) for column in columns)
            unit = "bytes" if name == "disk" else ""
            print(f"| {model.name} | {name} | {columns[0][name][0]:.1e} {unit} | {cells} |")
        totals = " | ".join(f"**{shown(sum(seconds for _, seconds in column.values()))}**" for column in columns)
        worst = [max(column, key=lambda name: column[name][1]) for column in columns]
        print(f"| {model.name} | **all** | | {totals} |")
        print(f"| {model.name} | *bottleneck* | | {' | '.join(worst)} |")
    print("\n| model | " + " | ".join(disk(MODELS[0], method)) + " |\n" + "|---" * 5 + "|")
    for model in MODELS:
        print(f"| {model.name} | " + " | ".join(f"{size / 1e9:.0f} GB" for size in disk(model, method).values()) + " |")


if __name__ == "__main__":
    main()
