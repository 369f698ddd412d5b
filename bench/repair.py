"""What a low rank beside a compressed checkpoint gives back, in three metrics, and what it takes.

    python bench/repair.py [--model FOLDER] [--samples 64] [--rank 16]

Prints Markdown: KL(dense || repaired) in nats per token on held-out text, and the bytes of model and adapter.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from machine import limits
from run import LENGTH, SAMPLES

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER

COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "`rtn`, 3 bits": ("rtn", {"bits": 3, "group_size": 64}),
    "`gptq`, 3 bits": ("gptq", {"bits": 3, "group_size": 64}),
    "`kronecker`, 3 bits": ("kronecker", {"bits": 3, "group_size": 64}),
    "`sparsegpt`, 2:4": ("sparsegpt", {"sparsity": "2:4"}),
    "`gptq`, 2:4 and 4 bits": ("gptq", {"sparsity": "2:4", "bits": 4, "group_size": 64}),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    model, shipped = arguments.model, arguments.model == DEFAULT_FOLDER
    texts = (None, None) if shipped else (model / "calibration.txt", model / "held_out.txt")
    settings: dict[str, Any] = {"data": texts[0], "samples": arguments.samples, "length": LENGTH}
    measuring: dict[str, Any] = {"reference": model, "data": texts[1], "samples": SAMPLES, "length": LENGTH}
    print("| compressed | metric | KL | bytes | and of the factors |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        compressed, repaired = Path(scratch) / "compressed", Path(scratch) / "repaired"
        for name, (method, options) in COMPRESSED.items():
            chosen = hesse.Options(**options)
            hesse.compress(model, compressed, method=method, options=chosen, overwrite=True, **settings)
            before = hesse.evaluate(compressed, **measuring).report
            print(f"| {name} | | {before.kl:.5f} | {before.bytes:,} | |", flush=True)
            for curvature in ("identity", "gram", "kronecker"):
                report = hesse.repair(
                    model,
                    compressed,
                    repaired,
                    rank=arguments.rank,
                    curvature=curvature,
                    overwrite=True,
                    **settings,
                ).report
                after = hesse.evaluate(compressed, merge_adapter=repaired, **measuring).report
                print(f"| {name} | `{curvature}` | {after.kl:.5f} | | {report.bytes_added:,} |", flush=True)
    print("\n", limits())


if __name__ == "__main__":
    main()
