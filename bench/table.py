"""The results of `run.py` as the page that the documentation shows."""

from pathlib import Path
from typing import Any

import hesse
from hesse.models.checkpoint import Checkpoint, read_json


def operations(model: Path, tokens: int) -> dict[str, float]:
    """Floating point operations of one calibration pass and of its Grams, from the shapes of the linear layers."""
    checkpoint = Checkpoint(model)
    shapes = {n: checkpoint.shape(n) for n in checkpoint.names() if ".layers." in n and len(checkpoint.shape(n)) == 2}
    forward = sum(2 * tokens * shape.numel() for shape in shapes.values())
    shared = ("k_proj", "v_proj", "up_proj")  # these have the inputs of q_proj and gate_proj
    gram = sum(2 * tokens * s[1] ** 2 for n, s in shapes.items() if not any(name in n for name in shared))
    return {"calibrate": forward, "estimate": gram}


def markdown(results: dict[str, Any], model: Path) -> str:
    """The page."""
    machine, rows = results["machine"], results["rows"]
    facts = read_json(model / "training.json") if (model / "training.json").exists() else {}
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench` (`bench/run.py`) with hesse {hesse.__version__}. Machine: {machine['processor']}, "
        f"{machine['threads']} threads, no GPU; Python {machine['python']}, torch {machine['torch']}. Measured in the "
        f"same run: matrix product {machine['gemm_float32'] / 1e9:.0f} GFLOP/s in float32 and "
        f"{machine['gemm_bfloat16'] / 1e9:.0f} in bfloat16, memory {machine['memory_bandwidth'] / 1e9:.0f} GB/s.",
        "",
        f"Model: the default model ({facts.get('parameters', 0) / 1e6:.1f} million parameters). Calibration: "
        f"{results['samples']} samples of {results['length']} tokens, the same tokens for every program. Quality: "
        "KL(dense || compressed) in nats per token on 128 windows of the held-out text, in float32, by `hesse "
        "evaluate`. Symmetric integers, weights only, `lm_head` left alone.",
        "",
        "Seconds, compressing: from the model in memory to compressed weights in memory (Hesse: calibrate, estimate, "
        "solve). Seconds, whole: from disk to disk; for Hesse with the probing of the loss that the prediction needs, "
        "and with reading the file back and measuring it. Imports are left out for all. The fastest of "
        f"{results['repeats']} runs is shown for Hesse and llm-compressor, taking turns; one run for the others.",
        "",
        "| case | program | KL | ± | ratio | seconds, compressing | ratio | seconds, whole | ratio | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = next(r for r in rows if r["case"] == row["case"] and r["program"] == "hesse")
        if "error" in row:
            lines.append(f"| {row['case']} | {row['program']} | failed: {row['error']} | | | | | | | |")
            continue
        name = row["program"] if row["program"] == "hesse" else f"{row['program']} {row.get('version', '')}"
        lines.append(
            f"| {row['case']} | {name} | {row['eval_kl']:.5f} | {row['eval_kl_standard_error']:.5f} "
            f"| {own['eval_kl'] / row['eval_kl']:.2f} | {row['seconds']:.1f} | {own['seconds'] / row['seconds']:.2f} "
            f"| {row['seconds_with_io']:.1f} | {own['seconds_with_io'] / row['seconds_with_io']:.2f} "
            f"| {row['peak_rss_bytes'] / 1e6:.0f} |"
        )
    lines += [
        "",
        "Ratios are Hesse / program: below 1 is better for Hesse. llm-compressor ran with 32 samples a batch, to be "
        "fast, except where its default of 1 is named. Plain rounding needs no data: the peer does nothing else, while "
        "Hesse's time is spent on predicting the cost, reading the file back and measuring.",
        "",
    ]
    return "\n".join(lines + _limits(results, model))


def _limits(results: dict[str, Any], model: Path) -> list[str]:
    """What share of the machine's rate each phase of the GPTQ run reaches."""
    row = next((r for r in results["rows"] if r["program"] == "hesse" and "4 bit, group 64, GPTQ" in r["case"]), None)
    if row is None:
        return []
    machine, tokens = results["machine"], results["samples"] * results["length"]
    work = operations(model, tokens)
    lines = [
        "## Where the time goes",
        "",
        "The 4-bit GPTQ run, by phase. The rate counts the linear layers' products in the calibration pass (peak: "
        "bfloat16, in which it runs where the processor has it), and full symmetric products for the Grams (peak: "
        "float32), of which little more than half is computed.",
        "",
        "| phase | seconds | share | GFLOP | of the peak rate |",
        "|---|---|---|---|---|",
    ]
    phases = row["phases"]
    for phase in ("read", "probe", "calibrate", "estimate", "solve", "write", "verify"):
        seconds = phases.get(phase, 0.0)
        peak = machine["gemm_bfloat16" if phase == "calibrate" else "gemm_float32"]
        rate = f"{work[phase] / 1e9:.0f} | {100 * work[phase] / seconds / peak:.0f} %" if phase in work else "- | -"
        lines.append(f"| {phase} | {seconds:.2f} | {100 * seconds / phases['total']:.0f} % | {rate} |")
    longest = max((p for p in phases if p != "total"), key=phases.__getitem__)
    lines += [f"| total | {phases['total']:.2f} | | | |", "", f"The next bottleneck: {longest}.", ""]
    return lines
