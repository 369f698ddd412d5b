"""The results of `run.py` as the page that the documentation shows."""

from pathlib import Path
from typing import Any

from prose import paragraph

import hesse
from hesse.checkpoints.checkpoint import Checkpoint


def operations(model: Path, tokens: int) -> dict[str, float]:
    """Floating point operations of one calibration pass, its Grams and its solves, from the linear layers' shapes.

    A solve hands each column's error to those after it, out · in² in all, and takes the Cholesky factor of its Gram
    and that factor's inverse, ⅔ in³.
    """
    checkpoint = Checkpoint(model)
    shapes = {n: checkpoint.shape(n) for n in checkpoint.names() if ".layers." in n and len(checkpoint.shape(n)) == 2}
    forward = sum(2 * tokens * shape.numel() for shape in shapes.values())
    shared = ("k_proj", "v_proj", "up_proj")  # these have the inputs of q_proj and gate_proj
    widths = [shape[1] for n, shape in shapes.items() if not any(name in n for name in shared)]
    gram = sum(2 * tokens * width**2 for width in widths)
    feedback = sum(shape[0] * shape[1] ** 2 for shape in shapes.values())
    return {"calibrate": forward, "estimate": gram, "solve": feedback + sum(2 * width**3 / 3 for width in widths)}


def markdown(every: list[dict[str, Any]], model: Path) -> str:
    """The page: the results of the default model, `model`, and then those of others."""
    results, machine = every[0], every[0]["machine"]
    taking = (
        "One run each."
        if results["repeats"] == 1
        else f"The fastest of {results['repeats']} alternating runs of Hesse and llm-compressor; one run of the others."
    )
    lines = [
        "# Benchmarks",
        "",
        paragraph(
            "Is Hesse better or faster than the program that you use now? This page compares compression with "
            "llm-compressor, GPTQModel and AutoRound, on the same tokens. To repeat it: `make bench`, or for your own "
            "model:"
        ),
        "",
        "    python bench/run.py --model FOLDER --only 'bit'",
        "",
        paragraph(
            "The value of each part of the default rounding is in [the default rounding](rounding.md), that of every "
            "method in [the methods](methods/index.md). For curvatures see [sums of rank-one "
            "matrices](benchmarks-curvature.md), compared with the machine's limits, and [EK-FAC, Hessian products, "
            "traces and diagonals](benchmarks-curvature-peers.md), compared with six programs."
        ),
        "",
        "## How it is measured",
        "",
        paragraph(
            f"Made by `make bench` (`bench/run.py`) with hesse {hesse.__version__}. Machine: {machine['processor']}, "
            f"{machine['threads']} threads, no GPU; Python {machine['python']}, torch {machine['torch']}. Measured in "
            f"the same run: matrix product {machine['gemm_float32'] / 1e9:.0f} GFLOP/s in float32 and "
            f"{machine['gemm_bfloat16'] / 1e9:.0f} in bfloat16, memory {machine['memory_bandwidth'] / 1e9:.0f} GB/s."
        ),
        "",
        paragraph(
            f"Calibration: {results['samples']} samples of {results['length']} tokens, the same tokens for every "
            "program. Quality: KL(dense || compressed) in nats per token on 128 windows of held-out text, and on the "
            "calibration samples themselves, in float32, by `hesse evaluate`. Symmetric integers, weights only, "
            "`lm_head` left alone. `hesse` is the default method, `hesse, gptq` is GPTQ; llm-compressor and GPTQModel "
            "run GPTQ, AutoRound 200 iterations."
        ),
        "",
        paragraph(
            "Seconds, compressing: from the model in memory to compressed weights in memory (Hesse: calibrate, "
            "estimate, solve, and with the default method probe; for plain rounding, which needs no data, solve). "
            "Seconds, whole: from disk to disk; Hesse's time includes the probing of the loss that the prediction "
            "needs, reading the file back and measuring it. Imports are left out for all. "
            f"{taking} Ratios are Hesse / program: below 1 is better for Hesse."
        ),
        "",
        paragraph(
            "† of an earlier run on the same kind of machine, with the same versions, tokens and settings. A dash in "
            "place of seconds means that other work disturbed the machine. llm-compressor ran with 32 samples a batch, "
            "which makes it faster, and with 1, its default, where that is named. In the rows of plain rounding the "
            "peer does nothing else, while most of Hesse's whole time goes into the prediction, reading the file back "
            "and measuring."
        ),
        "",
    ]
    for found in every:
        lines += _section(found)
    return "\n".join(lines + _limits(results, model))


def _section(results: dict[str, Any]) -> list[str]:
    """One model's table."""
    rows, model = results["rows"], results["model"]
    lines = [
        f"## The {model['name']} model",
        "",
        paragraph(
            f"{model['parameters'] / 1e6:.1f} million parameters, trained on {model['text']}; held-out perplexity "
            f"{model['held_out_perplexity']:.1f}, that of a trigram model {model['trigram_perplexity']:.1f}."
        ),
        "",
        "| case | program | KL, held out | ± | ratio | KL, calibration | seconds, compressing | ratio | seconds, whole "
        "| ratio | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = next(r for r in rows if r["case"] == row["case"] and r["program"] == "hesse")
        if "error" in row:
            lines.append(f"| {row['case']} | {row['program']} | failed: {row['error']} | | | | | | | | |")
            continue
        name = row["program"] if row["program"].startswith("hesse") else f"{row['program']} {row.get('version', '')}"
        times = [_seconds(row[key]) + f" | {own[key] / row[key]:.2f}" for key in ("seconds", "seconds_with_io")]
        if not (row.get("timed", True) and own.get("timed", True)):
            times = ["- | -"] * 2
        lines.append(
            f"| {row['case']} | {name}{' †' if row.get('earlier') else ''} | {row['eval_kl']:.5f} "
            f"| {row['eval_kl_standard_error']:.5f} | {own['eval_kl'] / row['eval_kl']:.2f} "
            f"| {_optional(row.get('calibration_kl'))} | {' | '.join(times)} | {row['peak_rss_bytes'] / 1e6:.0f} |"
        )
    return [*lines, ""]


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def _limits(results: dict[str, Any], model: Path) -> list[str]:
    """What share of the machine's rate each phase of the plain GPTQ run reaches."""
    row = next((r for r in results["rows"] if r["program"] == "hesse, gptq" and "4 bit, group 64" in r["case"]), None)
    if row is None:
        return []
    machine, tokens = results["machine"], results["samples"] * results["length"]
    work = operations(model, tokens)
    lines = [
        "## Where the time goes",
        "",
        paragraph(
            "The 4-bit GPTQ run, by phase. The rate counts: in the calibration pass the linear layers' products (peak: "
            "bfloat16, in which it runs where the processor has it); for the Grams full symmetric products (peak: "
            "float32), of which little more than half is computed; for the solve the products of error feedback and "
            "of factoring the Grams (float32). The solve spends its time on the vectors of one column after another."
        ),
        "",
        "| phase | seconds | share | GFLOP | of the peak rate |",
        "|---|---|---|---|---|",
    ]
    phases = row["phases"]
    for phase in ("read", "probe", "calibrate", "estimate", "solve", "predict", "write", "verify"):
        seconds = phases.get(phase, 0.0)
        peak = machine["gemm_bfloat16" if phase == "calibrate" else "gemm_float32"]
        rate = f"{work[phase] / 1e9:.0f} | {100 * work[phase] / seconds / peak:.0f} %" if phase in work else "- | -"
        lines.append(f"| {phase} | {seconds:.2f} | {100 * seconds / phases['total']:.0f} % | {rate} |")
    longest = max((p for p in phases if p != "total"), key=phases.__getitem__)
    lines += [f"| total | {phases['total']:.2f} | | | |", "", f"The next bottleneck: {longest}.", ""]
    return lines
