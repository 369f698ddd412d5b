"""Rank-one sums against this machine's limits and against the plain Woodbury formula.

    python bench/curvature.py

Results go to `bench/curvature.json` and `docs/benchmarks-curvature.md`.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from machine import best_of, limits
from prose import paragraph
from torch import Tensor

from hesse.curvature import BlockAccumulator, GradientWindow, RankOneSum

HERE = Path(__file__).resolve().parent
# d, m: along d at one m, and along m at one d; at most 6.4 GB of gradients.
SIZES = (
    *((d, 64) for d in (10**5, 10**6, 10**7)),
    (10**8, 16),
    *((10**6, m) for m in (16, 256, 512, 1024)),
)
BLOCKS = (10**7, 50, 1024, 64)  # weights, block size, gradients, gradients at once
DAMPING = 1e-4  # of the mean eigenvalue of the range


class Woodbury:
    """The textbook: one product for the inner products, a Cholesky factor, everything in float32."""

    def __init__(self, gradients: Tensor, damping: float) -> None:
        self.gradients, self.damping = gradients, damping
        core = gradients @ gradients.T
        core.diagonal().add_(len(gradients) * damping)
        self.factor = torch.linalg.cholesky(core)

    def solve(self, vector: Tensor) -> Tensor:
        """(H + λI)⁻¹ v."""
        inner = torch.cholesky_solve((self.gradients @ vector)[:, None], self.factor)[:, 0]
        return (vector - inner @ self.gradients) / self.damping


def rank_one(d: int, m: int) -> dict[str, Any]:
    """One row: set-up and products, for random gradients with a mean of their own."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(m, d, generator=generator).add_(0.3)
    vector = torch.randn(d, generator=generator)
    damping = RankOneSum.from_gradients(gradients[:, : 1 << 16]).damped(DAMPING, of="range").damping * d / (1 << 16)
    curvature = RankOneSum.from_gradients(gradients).with_damping(damping)
    plain = Woodbury(gradients, damping)
    row: dict[str, Any] = {"d": d, "m": m, "repeats": 3}
    row["set_up"] = best_of(lambda: RankOneSum.from_gradients(gradients).with_damping(damping).factor)
    row["set_up_woodbury"] = best_of(lambda: Woodbury(gradients, damping))
    row["matvec"] = best_of(lambda: curvature.matvec(vector))
    row["solve"] = best_of(lambda: curvature.solve(vector))
    row["solve_woodbury"] = best_of(lambda: plain.solve(vector))
    unit = torch.zeros(m)
    unit[0] = 1
    row["solve_in_span"] = best_of(lambda: curvature.solve_in_span(unit))
    if m * d <= 10**8:  # else the window's copy and float64 truth do not fit beside them
        window = GradientWindow(m, (d,))
        for gradient in gradients:
            window.push(gradient)
        row["push"] = best_of(lambda: window.push(vector))
        del window
        wide = gradients.double()
        core = wide @ wide.T / m
        core.diagonal().add_(damping)
        truth = torch.linalg.solve(core, unit.double()) @ wide  # H⁻¹g₀ by the push-through identity, in float64
        for name, found in (
            ("error_in_span", curvature.solve_in_span(unit)),
            ("error_solve", curvature.solve(gradients[0])),
            ("error_woodbury", plain.solve(gradients[0])),
        ):
            row[name] = float((found - truth).norm() / truth.norm())
    return row


def blocks(d: int, size: int, m: int, at_once: int) -> dict[str, Any]:
    """OBERT's setting: blocks of `size` from `m` gradients that come `at_once` together."""
    few = torch.randn(at_once, d, generator=torch.Generator().manual_seed(0))
    accumulator = BlockAccumulator((d,), size)
    add = best_of(lambda: accumulator.add(few), 2)
    curvature = accumulator.curvature().damped(0.01)
    start = time.perf_counter()
    curvature.solve(few[0])
    factor = time.perf_counter() - start
    return {
        "d": d,
        "block_size": size,
        "m": m,
        "at_once": at_once,
        "add": add,
        "all_gradients": add * m / at_once,
        "factor": factor,
        "solve": best_of(lambda: curvature.solve(few[0])),
        "matvec": best_of(lambda: curvature.matvec(few[0])),
    }


def page(results: dict[str, Any]) -> str:
    """The tables, in shares of the machine's limits."""
    machine = results["machine"]
    flops, bandwidth = machine["gemm_float32"], machine["memory_read"]
    lines = [
        "# Curvature benchmarks",
        "",
        paragraph(
            "What do set-up, products and solves of a [RankOneSum](curvatures/rank-one-sum.md) or "
            "[BlockRankOneSum](curvatures/block-rank-one-sum.md) cost at your number of weights d and gradients m? "
            "These tables compare them with the machine's limits; `python bench/curvature.py` repeats them."
        ),
        "",
        paragraph(
            f"Machine: {machine['processor']}, {machine['threads']} threads, no GPU; Python {machine['python']}, torch "
            f"{machine['torch']}. Measured in the same run: matrix product {flops / 1e9:.0f} GFLOP/s in float32, "
            f"reading memory {bandwidth / 1e9:.0f} GB/s. The fastest of three."
        ),
        "",
        "## RankOneSum",
        "",
        paragraph(
            "d weights, m gradients. Set-up is the inner products and their Cholesky factor. Its rate counts d m² "
            "operations (one triangle of the symmetric product), so a full product at the peak rate would show 50 %. A "
            "product reads the gradients twice; its share is of the memory's rate. Woodbury is the textbook formula in "
            "float32."
        ),
        "",
        "| d | m | set-up, s | of peak | Woodbury | matvec, s | of memory | solve, s | of memory | Woodbury | "
        "in span, s | push, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rank_one"]:
        d, m = row["d"], row["m"]
        twice = 2 * 4 * d * m / bandwidth
        push = f"{row['push']:.3f}" if "push" in row else "-"
        lines.append(
            f"| {d:.0e} | {m} | {row['set_up']:.3f} | {100 * d * m * m / row['set_up'] / flops:.0f} % "
            f"| {row['set_up_woodbury']:.3f} | {row['matvec']:.3f} | {100 * twice / row['matvec']:.0f} % "
            f"| {row['solve']:.3f} | {100 * twice / row['solve']:.0f} % | {row['solve_woodbury']:.3f} "
            f"| {row['solve_in_span']:.3f} | {push} |"
        )
    lines += [
        "",
        paragraph(
            f"Relative error of H⁻¹g for a gradient g of the sum, at λ = {DAMPING:g} of the mean eigenvalue of the "
            "range, against float64:"
        ),
        "",
        "| d | m | `solve_in_span` | `solve` | Woodbury |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['d']:.0e} | {row['m']} | {row['error_in_span']:.1e} | {row['error_solve']:.1e} "
        f"| {row['error_woodbury']:.1e} |"
        for row in results["rank_one"]
        if "error_solve" in row
    ]
    row = results["blocks"]
    gigabytes = row["d"] * row["block_size"] * 4 / 1e9
    rate = 2 * row["d"] * row["block_size"] * row["at_once"] / row["add"] / flops
    lines += [
        "",
        "## BlockRankOneSum",
        "",
        f"oBERT's setting: {row['d']:.0e} weights in blocks of {row['block_size']} ({gigabytes:.1f} GB), "
        f"{row['m']} gradients, {row['at_once']} at a time.",
        "",
        "| | seconds |",
        "|---|---|",
        f"| {row['at_once']} gradients added | {row['add']:.2f}, {100 * rate:.0f} % of the peak rate |",
        f"| all {row['m']} | {row['all_gradients']:.1f} |",
        f"| Cholesky factors, and a first solve | {row['factor']:.2f} |",
        f"| solve | {row['solve']:.3f} |",
        f"| matvec | {row['matvec']:.3f} |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run everything and write the results."""
    results: dict[str, Any] = {"machine": limits(), "rank_one": []}
    source = torch.ones(1 << 28)
    results["machine"]["memory_read"] = source.nbytes / best_of(source.sum, 10)
    del source
    for d, m in SIZES:
        results["rank_one"].append(rank_one(d, m))
        print(json.dumps(results["rank_one"][-1]), flush=True)
    results["blocks"] = blocks(*BLOCKS)
    print(json.dumps(results["blocks"]), flush=True)
    (HERE / "curvature.json").write_text(json.dumps(results, indent=2) + "\n")
    (HERE.parent / "docs" / "benchmarks-curvature.md").write_text(page(results))


if __name__ == "__main__":
    main()
