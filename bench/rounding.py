"""What each part of the default rounding is worth: the same model and tokens, one part changed at a time.

    python bench/rounding.py [--model FOLDER]

Prints a table of KL(dense || compressed) in nats per token on held-out text, and on the calibration samples.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from run import LENGTH, SAMPLES

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.data import read_samples
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import GridOptions
from hesse.methods.recipe import Recipe, Rule
from hesse.methods.solver_options import SolverOptions

GRIDS = ((4, 64), (3, 64), (2, 32))
SIGNED = {"headroom": 1.0, "signed": True}
PLAIN = {"headroom": 0.25}
TWO_SIDED = {"name": "two_sided_feedback"}
ONE_SIDED = {"name": "error_feedback", "order": "descending"}

# name: curvature, grid, solver
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain GPTQ": ("gram", PLAIN, ONE_SIDED),
    "plain GPTQ, signed scales": ("gram", SIGNED, ONE_SIDED),
    "two-sided, unsigned scales": ("kronecker", PLAIN, TWO_SIDED),
    "two-sided, signed scales (the default)": ("kronecker", SIGNED, TWO_SIDED),
    "  headroom 0.5": ("kronecker", {**SIGNED, "headroom": 0.5}, TWO_SIDED),
    "  headroom 1.5": ("kronecker", {**SIGNED, "headroom": 1.5}, TWO_SIDED),
    "  output damping 0.03": ("kronecker", SIGNED, {**TWO_SIDED, "output_damping": 0.03}),
    "  output damping 3": ("kronecker", SIGNED, {**TWO_SIDED, "output_damping": 3.0}),
    "  output damping 1000: no weighing of outputs": ("kronecker", SIGNED, {**TWO_SIDED, "output_damping": 1e3}),
    "  damping 0.001": ("kronecker", SIGNED, {**TWO_SIDED, "damping": 0.001}),
    "  damping 0.1": ("kronecker", SIGNED, {**TWO_SIDED, "damping": 0.1}),
}


def measure(
    variant: str, bits: int, group_size: int, model: Path, ids: Path, held_out: Path | None
) -> tuple[float, float]:
    """KL on held-out text and on the calibration samples."""
    curvature, grid, solver = VARIANTS[variant]
    constraint = ConstraintOptions(grid=GridOptions(bits=bits, group_size=group_size, **grid))
    rule = Rule(curvature=curvature, constraint=constraint, solver=SolverOptions(**solver))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        hesse.compress(model, out, recipe=Recipe(rules=(rule,)), data=ids)
        found = [
            hesse.evaluate(out, reference=model, data=data, samples=SAMPLES, length=LENGTH).kl
            for data in (held_out, ids)
        ]
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1]


def main() -> None:
    """Print a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER, help="a folder that train_models.py made")
    model = parser.parse_args().model.resolve()
    shipped = model == DEFAULT_FOLDER.resolve()
    calibration, held_out = (None, None) if shipped else (model / "calibration.txt", model / "held_out.txt")
    samples, _ = read_samples(
        calibration, model, count=SAMPLES, length=LENGTH, seed=0, purpose="calibration", limit=None
    )
    print("| | " + " | ".join(f"{bits} bit, group {group}" for bits, group in GRIDS) + " |", "|---" * 4 + "|", sep="\n")
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "calibration.jsonl"
        ids.write_text("".join(json.dumps({"input_ids": sample.tolist()}) + "\n" for sample in samples.ids))
        for variant in VARIANTS:
            cells = [measure(variant, bits, group, model, ids, held_out) for bits, group in GRIDS]
            row = " | ".join(f"{kl:.5f} ({own:.5f})" for kl, own in cells)
            print(f"| {variant.replace('  ', '&nbsp;&nbsp;')} | {row} |", flush=True)


if __name__ == "__main__":
    main()
