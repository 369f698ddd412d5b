"""Whether a rewriting makes a model easier to round, on the default model and on one with outliers planted.

    python bench/rewriting.py [--samples 24] [--only weights]

The default model's inputs have few outliers. The planted one is the same function: behind each norm four channels are
30 times as large, by its scales, and the weights that read them as much smaller.
Prints Markdown: KL(dense || compressed) in nats per token on held-out text; then each claim with its outcome.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from machine import limits
from safetensors.torch import load_file

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.checkpoints.writer import write_tensors
from hesse.errors import HesseError

LENGTH, EVALUATED = 256, 32
CHANNELS, TIMES = [17, 80, 143, 201], 30.0
READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
Row = tuple[str, dict[str, Any]]
ROTATIONS = ("gptq", "quarot", "kurtail")
GRIDS = [{"bits": bits, "group_size": group} for bits, group in ((3, 64), (2, 32), (3, -1))]
BYTES = {"bits": 8, "group_size": -1, "input_bits": 8}
W4A8 = {"bits": 4, "group_size": 64, "input_bits": 8}
W4A4 = {"bits": 4, "group_size": 64, "input_bits": 4}
AWQ = {"bits": 3, "group_size": 64}
TABLES: dict[str, list[Row]] = {
    "weights": [(method, grid) for grid in GRIDS for method in ROTATIONS],
    "awq": [(method, AWQ) for method in ("rtn", "awq", "awq-dense")],
    "w8a8": [(method, BYTES) for method in ("rtn", "smoothquant")],
    "w4a8": [(method, W4A8) for method in ("gptq", "qqq", "quarot")],
    "w4a4": [(method, W4A4) for method in ROTATIONS],
}
# What is claimed: the first costs less than the second, at the same setting.
CLAIMS: list[tuple[str, str, str, str, dict[str, Any]]] = [
    *(("rotating helps GPTQ", "weights", "quarot", "gptq", grid) for grid in GRIDS),
    *(("a learned rotation is better than a random one", "weights", "kurtail", "quarot", grid) for grid in GRIDS),
    ("AWQ is better than plain rounding", "awq", "awq", "rtn", AWQ),
    ("scales taken into the layers before cost what they cost beside the layer", "awq", "awq", "awq-dense", AWQ),
    ("smoothing helps where inputs are rounded", "w8a8", "smoothquant", "rtn", BYTES),
    ("smoothing helps GPTQ where inputs are rounded", "w4a8", "qqq", "gptq", W4A8),
    ("rotating helps GPTQ where inputs are rounded", "w4a4", "quarot", "gptq", W4A4),
    ("a learned rotation is better than a random one", "w4a4", "kurtail", "quarot", W4A4),
]


def planted(folder: Path) -> Path:
    """The default model with outliers, in `folder`."""
    tensors = load_file(DEFAULT_FOLDER / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[CHANNELS] *= TIMES
        if name.endswith(READERS):
            tensor[:, CHANNELS] /= TIMES
    folder.mkdir()
    for path in DEFAULT_FOLDER.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def measure(method: str, options: dict[str, Any], model: Path, samples: int) -> float | str:
    """KL to `model` on held-out text, or why there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        try:
            hesse.compress(model, out, method=method, options=hesse.Options(**options), samples=samples, length=LENGTH)
        except HesseError as error:
            return f"refused: {error}"
        kl = hesse.evaluate(out, reference=model, samples=EVALUATED, length=LENGTH).report.kl
    assert kl is not None
    return kl


def main() -> None:
    """Run what was asked for, and print the tables and the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--only", default=",".join(TABLES))
    arguments = parser.parse_args()
    found: dict[tuple[str, str, str, str], float | str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = {"default": DEFAULT_FOLDER, "planted": planted(Path(scratch) / "planted")}
        for table in arguments.only.split(","):
            print("\n| method | options | " + " | ".join(models) + " |\n|---|---|" + "---|" * len(models), flush=True)
            for method, options in TABLES[table]:
                kls = {name: measure(method, options, model, arguments.samples) for name, model in models.items()}
                found |= {(table, method, str(options), name): kl for name, kl in kls.items()}
                said = " | ".join(f"{kl:.5f}" if isinstance(kl, float) else kl for kl in kls.values())
                print(f"| `{method}` | {', '.join(f'{k} {v}' for k, v in options.items())} | {said} |", flush=True)
        print("\n| claim | model | KL | against | outcome |\n|---|---|---|---|---|")
        for claim, table, better, worse, options in CLAIMS:
            for name in models:
                first, second = (found.get((table, method, str(options), name)) for method in (better, worse))
                if isinstance(first, float) and isinstance(second, float):
                    outcome = "holds" if first < second else "does not hold here"
                    said = ", ".join([claim, *(f"{key} {value}" for key, value in options.items())])
                    print(f"| {said} | {name} | {first:.5f} (`{better}`) | {second:.5f} (`{worse}`) | {outcome} |")
    print("\n", limits())


if __name__ == "__main__":
    main()
