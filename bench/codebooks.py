"""Tables of values for each row, alone and with a few weights kept beside them, under three curvatures.

    python bench/codebooks.py [--model FOLDER] [--samples 64] [--bits 2,3]

Prints Markdown: KL(dense || compressed) in nats per token on held-out text, the predicted loss, and bits a weight as
the sets count them, with tables, masks and outliers; grids with a scale a row beside.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from machine import limits
from methods import stored_dtype
from run import LENGTH, SAMPLES

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.methods import Recipe, Rule
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import CodebookOptions, GridOptions, OutlierOptions
from hesse.methods.solver_options import SolverOptions

SHARE = 0.0045  # of the weights kept beside the tables, as in SqueezeLLM
# Curvature, the solver of codes alone, and that of codes and what is kept.
CURVATURES = (
    ("fisher_diagonal", "nearest", "nearest"),
    ("gram", "error_feedback", "feedback_outliers"),
    ("kronecker", "two_sided_feedback", "two_sided_outliers"),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--bits", default="2,3")
    arguments = parser.parse_args()
    model, shipped = arguments.model, arguments.model == DEFAULT_FOLDER
    texts = (None, None) if shipped else (model / "calibration.txt", model / "held_out.txt")
    print("| curvature | set | bits a weight | KL | predicted |\n|---|---|---|---|---|")
    for bits in map(int, arguments.bits.split(",")):
        signed = GridOptions(bits=bits, group_size=-1, headroom=1.0, signed=True)
        sets = {
            f"{bits} bits, a scale a row": ConstraintOptions(grid=signed),
            f"{bits} bits, a table a row": ConstraintOptions(codebook=CodebookOptions(bits=bits)),
            f"{bits} bits, a table a row, {SHARE:.2%} as they are": ConstraintOptions(
                codebook=CodebookOptions(bits=bits), outliers=OutlierOptions(share=SHARE)
            ),
        }
        for name, constraint in sets.items():
            for curvature, alone, beside in CURVATURES:
                if constraint.grid is not None and curvature == "fisher_diagonal":
                    continue
                solver = SolverOptions(name=alone if constraint.outliers is None else beside)
                recipe = Recipe(rules=(Rule(curvature=curvature, constraint=constraint, solver=solver),))
                with tempfile.TemporaryDirectory() as scratch:
                    out = Path(scratch) / "out"
                    report = hesse.compress(
                        model, out, recipe=recipe, data=texts[0], samples=arguments.samples, length=LENGTH
                    ).report
                    found = hesse.evaluate(out, reference=model, data=texts[1], samples=SAMPLES, length=LENGTH).report
                stored = constraint.build().stored_as(stored_dtype(model))
                shapes = [torch.Size(layer.shape) for layer in report.layers]
                total = sum(shape.numel() for shape in shapes)
                size = sum(stored.bits_per_weight(shape) * shape.numel() for shape in shapes) / total
                predicted = report.loss.predicted
                print(f"| `{curvature}` | {name} | {size:.2f} | {found.kl:.5f} | {predicted:.5f} |", flush=True)
    print("\n", limits())


if __name__ == "__main__":
    main()
