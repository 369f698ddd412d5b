"""What the same quality takes: Hesse from fewer samples beside llm-compressor's GPTQ from all, 4 bits in groups of 64.

    python bench/equal_quality.py [--repeats 3] [--model FOLDER]

Programs take turns; the fastest run of each counts. Prints a table: KL(dense || compressed) on held-out text in nats
per token, and the seconds of probing, calibrating, estimating and solving, or of llm-compressor's one-shot call.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import limits
from run import LENGTH, SAMPLES, Case, run_peer

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.data import read_samples

PEER = Case("4 bit, group 64", "gptq", "gptq", 4, 64)
PHASES = ("probe", "calibrate", "estimate", "solve")
RUNS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (128, ("--method", "gptq")),
    (64, ("--method", "gptq")),
    (64, ("--method", "gptq", "--signed")),
    (32, ("--method", "gptq", "--signed")),
    (16, ("--method", "gptq", "--signed")),
    (32, ("--method", "kronecker")),
    (16, ("--method", "kronecker")),
    (8, ("--method", "kronecker")),
)


def compress(model: Path, ids: Path, out: Path, options: tuple[str, ...]) -> float:
    """Seconds that Hesse takes, in a process of its own."""
    command = [sys.executable, "-m", "hesse", "compress", str(model), str(out), "--json", "--data", str(ids)]
    command += ["--bits", "4", "--group-size", "64", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = json.loads(done.stdout)["seconds"]
    return sum(float(seconds[phase]) for phase in PHASES)


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    arguments = parser.parse_args()
    model = arguments.model
    found: dict[str, tuple[int, float, float]] = {}  # samples, seconds, KL
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shipped = model == DEFAULT_FOLDER
        texts, held_out = (None, None) if shipped else (model / "calibration.txt", model / "held_out.txt")
        samples, _ = read_samples(texts, model, count=SAMPLES, length=LENGTH, seed=0, purpose="calibration", limit=None)
        lines = [json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in samples.ids]
        for number in {SAMPLES, *(number for number, _ in RUNS)}:
            (place / f"{number}.jsonl").write_text("".join(lines[:number]))

        def note(name: str, number: int, seconds: float, out: Path) -> None:
            if name not in found or seconds < found[name][1]:
                kl: Any = hesse.evaluate(out, reference=model, data=held_out, samples=SAMPLES, length=LENGTH).report.kl
                found[name] = number, seconds, float(kl)
            print(name, number, f"{seconds:.2f} s", flush=True)

        for repeat in range(arguments.repeats):
            for number, options in RUNS:
                name, out = f"{' '.join(options[1:])}, {number}", place / f"{repeat}-{number}-{'-'.join(options)}"
                note(name, number, compress(model, place / f"{number}.jsonl", out, options), out)
            out = place / f"{repeat}-peer"
            account = run_peer("llmcompressor", PEER, model, place / f"{SAMPLES}.jsonl", out)
            note("llm-compressor", SAMPLES, float(account["seconds"]), out)
    whole = found["llm-compressor"][1]
    print("\n| program | samples | KL | seconds | of llm-compressor's |\n|---|---|---|---|---|")
    for name, (number, seconds, kl) in found.items():
        print(f"| {name.rpartition(',')[0] or name} | {number} | {kl:.5f} | {seconds:.1f} | {seconds / whole:.2f} |")
    print(limits())


if __name__ == "__main__":
    main()
