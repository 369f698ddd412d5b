"""How long the sweeps of rounding take on a GPU, the kernels beside the plain sweeps, on square layers.

    python bench/gpu_sweep.py [--widths 4096 8192]

Prints a table. The plain sweep over columns runs on the GPU too, the plain sweeps over both sides on the CPU. Needs a
GPU and Triton, and has not been run on one yet. Without a GPU, `TRITON_INTERPRET=1 python bench/gpu_sweep.py --widths
96` goes through all of it in Triton's interpreter, where the times mean nothing.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from hesse import ErrorFeedback, Gram, Grid, Kronecker, TwoSidedFeedback
from hesse.solvers.sweeps import kernels
from hesse.solvers.sweeps import two_sided as plain
from hesse.solvers.sweeps.kernels import two_sided
from hesse.solvers.two_sided_search import GridSearch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRID = Grid(4, 32 if DEVICE.type == "cpu" else 128, headroom=1.0, signed=True, dtype=torch.bfloat16)


class Row(NamedTuple):
    """One sweep over one layer."""

    name: str
    width: int
    blocks: int  # launches that wait for one another
    products: float  # operations of its matrix products
    seconds: float
    plain: float


def seconds(action: Callable[[], object], repeats: int) -> float:
    """The fastest of `repeats` runs, after one to compile and warm up."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def moment(width: int) -> Tensor:
    """Second moments (width, width) of inputs with a common direction."""
    inputs = torch.randn(2 * width, width, device=DEVICE) + torch.randn(2 * width, 1, device=DEVICE)
    return inputs.T @ inputs / len(inputs)


def by_columns(width: int) -> Row:
    """ErrorFeedback: its sweep, and the comparison with plain rounding that follows."""
    solver, weight = ErrorFeedback("descending"), torch.randn(width, width, device=DEVICE)
    state = solver.init(Gram(second_moment=moment(width), tokens=2 * width).damped(0.01))
    found = []
    for in_kernels in (True, False):
        with patch.object(kernels, "run_on", return_value=in_kernels):
            found.append(seconds(lambda: solver.compute(state, weight, GRID), 3))
    return Row("columns", width, -(-width // solver.block_size), float(width) ** 3, *found)


def by_both_sides(width: int) -> list[Row]:
    """TwoSidedFeedback: feedback and descent, each without the refitting around them."""
    curvature = Kronecker(output_factor=moment(width), input_factor=moment(width)).with_damped_factors(0.3, 0.01)
    state, weight = TwoSidedFeedback().init(curvature), torch.randn(width, width, device=DEVICE)
    search, rounded = GridSearch(state, GRID, weight), GRID.round(weight, GRID.fit(weight))
    priced = search.price(search.feed_back(rounded, weight))
    work, codes = weight.T[state.columns][:, state.rows].contiguous(), priced.code.codes.float()
    codes, slope = (each.T[state.columns][:, state.rows].contiguous() for each in (codes, priced.slope))
    steps = search.levels(rounded)
    fed = (steps, state.column_feedback, state.row_feedback)
    descended = (steps, state.input_factor, state.output_factor)

    def on_cpu(arguments: tuple) -> list:
        return [
            plain.GridLevels(*(part.cpu() for part in each[:4]), each.dtype) if isinstance(each, tuple) else each.cpu()
            for each in arguments
        ]

    plain_fed, plain_descended, blocks = on_cpu(fed), on_cpu(descended), -(-width // two_sided.TILE)
    return [
        Row(
            "both sides, feedback",
            width,
            2 * blocks - 1,
            2.0 * width**3,
            seconds(lambda: two_sided.feed_back(work.clone(), *fed), 3),
            seconds(lambda: plain.feed_back(work.cpu().clone(), *plain_fed), 1),
        ),
        Row(
            "both sides, descent",
            width,
            -(-width // plain.BLOCK),
            float(width) ** 3,
            seconds(lambda: two_sided.descend(codes.clone(), slope.clone(), *descended), 3),
            seconds(lambda: plain.descend(codes.cpu().clone(), slope.cpu().clone(), *plain_descended), 1),
        ),
    ]


def peak(size: int) -> float:
    """Operations per second of a bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return 2.0 * size**3 / seconds(lambda: a @ b, 10)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 8192])
    widths = parser.parse_args().widths
    torch.manual_seed(0)
    fastest = peak(max(widths))
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU: Triton's interpreter"
    print(f"{name}, torch {torch.__version__}; bfloat16 product {fastest / 1e12:.1f} Tflop/s\n")
    print("| sweep | width | ms a layer | blocks | ms a block | plain, ms a layer | products, % of the bfloat16 peak |")
    print("|---|---|---|---|---|---|---|")
    for width in widths:
        for row in (by_columns(width), *by_both_sides(width)):
            layer, share = 1e3 * row.seconds, 100 * row.products / row.seconds / fastest
            print(
                f"| {row.name} | {row.width} | {layer:.2f} | {row.blocks} | {layer / row.blocks:.3f} "
                f"| {1e3 * row.plain:.1f} | {share:.2f} |"
            )


if __name__ == "__main__":
    main()
