"""What the methods of the literature cost on one model, and whether the papers' claims hold there, in small.

    python bench/methods.py [--model FOLDER] [--only prune,round,factorise,sum] [--samples 128]

Prints Markdown: KL(dense || compressed) in nats per token on held-out text, predicted loss, bits a weight as the
constraint counts them, and seconds; then each claim with its outcome.
"""

import argparse
import json
import operator
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import limits
from run import LENGTH, SAMPLES

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.errors import HesseError
from hesse.formats import open_checkpoint

Row = tuple[str, dict[str, Any]]
GRID = {"bits": 3, "group_size": 64}
COARSE = {"bits": 2, "group_size": 64}
TABLES: dict[str, list[Row]] = {
    "prune": [
        (method, {"sparsity": amount})
        for amount in (0.5, 0.7, "2:4")
        for method in ("magnitude", "obd", "wanda", "sparsegpt", "admm", "kronecker-admm", "obc", "obert")
    ]
    + [(method, {"sparsity": 0.5}) for method in ("woodfisher", "m-fac")]
    + [(method, {"sparsity": 0.7}) for method in ("woodfisher", "m-fac")]
    + [
        (method, {"sparsity": 0.5, "block": 4})
        for method in ("magnitude", "obd", "wanda", "sparsegpt", "admm", "kronecker-admm", "obc", "obert")
    ]
    + [
        (method, {"sparsity": amount, "scope": scope})
        for amount in (0.5, 0.7)
        for scope in ("global", "lamp")
        for method in ("magnitude", "sparsegpt")
    ],
    "round": [
        *((method, GRID) for method in ("rtn", "gptq", "obq", "kronecker")),
        ("lorc", {**GRID, "rank": 16}),
        ("eora", {**GRID, "rank": 16}),
        ("squeezellm", {"bits": 3}),
        ("kronecker-codebook", {"bits": 3}),
        ("minifloat", {"table": "fp4", "group_size": 64}),
        ("minifloat", {"table": "nf4", "group_size": 64}),
        *((method, GRID) for method in ("adadim", "adadim-rtn", "slim-llm")),
        *((method, COARSE) for method in ("rtn", "gptq", "kronecker", "adadim", "adadim-rtn", "slim-llm")),
        *((method, options) for method in ("quarot", "rsq") for options in (GRID, COARSE)),
        *(("aptq", options) for options in (GRID, COARSE)),
        *(("adaround", options) for options in (GRID, COARSE)),
        ("adaround-kronecker", COARSE),
        *(("vptq", {"bits": bits, "vector_length": length}) for bits, length in ((2, 4), (3, 2))),
        ("vptq", {"bits": 2, "vector_length": 8, "books": 2}),
        ("gptq", {"bits": 4, "group_size": 64}),
        ("rtn", {"bits": 3, "group_size": -1}),
        *((method, {"bits": 3, "group_size": -1}) for method in ("gptq", "quip")),
        ("quip", COARSE),
    ],
    "below-two-bits": [
        ("ptq161", {}),
        ("onebit", {}),
        ("squeezellm", {"bits": 1}),
        ("rtn", {"bits": 2, "group_size": -1}),
    ],
    "factorise": [
        (method, {"rank": rank})
        for rank in (64, 128)
        for method in ("svd", "fwsvd", "activation-svd", "kronecker-svd", "curing")
    ],
    "sum": [  # 20 is the rank that takes the room of an eighth of these weights
        *((method, {"sparsity": 0.5}) for method in ("wanda", "sparsegpt")),
        *((method, {"sparsity": 0.625, "rank": 20}) for method in ("oats", "sparse-low-rank")),
        *(("lq-lora", {"table": table, "group_size": 64, "rank": 16}) for table in ("nf3", "nf4")),
        ("minifloat", {"table": "nf3", "group_size": 64}),
        ("lorc", {**GRID, "rank": 16}),
        ("eora", {**GRID, "rank": 16}),
        ("eora", {"bits": 4, "group_size": 64, "rank": 16, "sparsity": "2:4"}),
        ("gptq", {"bits": 4, "group_size": 64, "sparsity": "2:4"}),
        ("sparse-low-rank", {"bits": 4, "group_size": 64, "rank": 16, "sparsity": "2:4"}),
    ],
}
# What is claimed: the first costs less than the second, at the same setting.
CLAIMS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("Wanda is far above magnitude", "wanda", "magnitude", {"sparsity": 0.5}),
    ("SparseGPT is better than Wanda", "sparsegpt", "wanda", {"sparsity": 0.5}),
    ("ADMM is better than SparseGPT", "admm", "sparsegpt", {"sparsity": 0.5}),
    ("ADMM is better than SparseGPT", "admm", "sparsegpt", {"sparsity": 0.7}),
    ("the end loss's curvature prunes better than the layer's", "kronecker-admm", "admm", {"sparsity": 0.5}),
    ("the end loss's curvature prunes better than the layer's", "kronecker-admm", "admm", {"sparsity": "2:4"}),
    ("exact surgery is better than one order for all rows", "obc", "sparsegpt", {"sparsity": 0.5}),
    ("exact surgery is better than one order for all rows", "obc", "sparsegpt", {"sparsity": "2:4"}),
    ("WoodFisher is better than magnitude", "woodfisher", "magnitude", {"sparsity": 0.5}),
    ("M-FAC is better than WoodFisher", "m-fac", "woodfisher", {"sparsity": 0.5}),
    ("M-FAC is better than magnitude", "m-fac", "magnitude", {"sparsity": 0.5}),
    ("counting what removals do to one another helps", "obert", "woodfisher", {"sparsity": 0.5}),
    ("oBERT is better than magnitude in blocks of 4", "obert", "magnitude", {"sparsity": 0.5, "block": 4}),
    ("exact costs of blocks are better than sums", "obc", "sparsegpt", {"sparsity": 0.5, "block": 4}),
    ("second-order saliency is better than magnitude", "obd", "magnitude", {"sparsity": 0.5}),
    ("one order for all rows rounds as well as OBQ", "gptq", "obq", GRID),
    ("groups along either side are better than along rows", "adadim-rtn", "rtn", GRID),
    ("groups along either side are better than along rows", "adadim", "gptq", COARSE),
    ("positions weighed by attention are better than equal ones", "rsq", "quarot", GRID),
    ("positions weighed by attention are better than equal ones", "rsq", "quarot", COARSE),
    ("the attention's output is a better aim than each layer's", "aptq", "gptq", GRID),
    ("the attention's output is a better aim than each layer's", "aptq", "gptq", COARSE),
    ("the attention's output is a better aim than the loss", "aptq", "kronecker", COARSE),
    ("learned rounding is better than error feedback", "adaround", "gptq", COARSE),
    ("learned rounding is better than error feedback", "adaround-kronecker", "kronecker", COARSE),
    ("bits mixed over groups are better than one width", "slim-llm", "gptq", COARSE),
    ("incoherence helps at few bits", "quip", "gptq", {"bits": 3, "group_size": -1}),
    ("incoherence helps at few bits", "quip", "gptq", COARSE),
    ("activation-aware SVD is better than SVD", "activation-svd", "svd", {"rank": 128}),
    ("Fisher-weighted SVD is better than SVD", "fwsvd", "svd", {"rank": 128}),
    ("Fisher-weighted SVD is better than SVD", "fwsvd", "svd", {"rank": 64}),
    ("CUR comes close to SVD", "activation-svd", "curing", {"rank": 128}),
]

# The same at settings of which each method has its own.
CLAIMS_ACROSS: list[tuple[str, Row, Row]] = [
    ("codebooks of vectors are better than grids", ("vptq", {"bits": 2, "vector_length": 4}), ("gptq", COARSE)),
]


def named(method: str, options: dict[str, Any]) -> str:
    """A row's name."""
    return f"{method} {json.dumps(options, sort_keys=True)}"


def asked(options: dict[str, Any]) -> str:
    """Options as a person reads them."""
    return ", ".join(f"{key} {value}" for key, value in options.items())


def measure(method: str, options: dict[str, Any], model: Path, texts: tuple[Any, Any], samples: int) -> dict[str, Any]:
    """Compress, and evaluate on held-out text."""
    calibration, held_out = texts
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        chosen = hesse.Options(**options)
        report = hesse.compress(
            model, out, method=method, options=chosen, data=calibration, samples=samples, length=LENGTH
        ).report
        found = hesse.evaluate(out, reference=model, data=held_out, samples=SAMPLES, length=LENGTH).report
    (rule,) = hesse.methods.METHODS[method].recipe(chosen).rules
    constraint = rule.constraint.build().stored_as(stored_dtype(model))
    shapes = [layer.shape for layer in report.layers]
    total = sum(rows * columns for rows, columns in shapes)
    bits = sum(constraint.bits_per_weight(torch.Size(shape)) * shape[0] * shape[1] for shape in shapes) / total
    assert found.kl is not None
    return {
        "kl": found.kl,
        "predicted": report.loss.predicted,
        "bits": bits,
        "seconds": report.seconds["total"],
    }


def stored_dtype(model: Path) -> torch.dtype:
    """The type that the model's weights are stored in."""
    checkpoint = open_checkpoint(model)
    return checkpoint.dtype(next(name for name in checkpoint.names() if name.endswith("q_proj.weight")))


def main() -> None:
    """Run what was asked for, and print the tables and the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    arguments = parser.parse_args()
    shipped = arguments.model == DEFAULT_FOLDER
    texts = (None, None) if shipped else (arguments.model / "calibration.txt", arguments.model / "held_out.txt")
    found: dict[str, dict[str, Any]] = {}
    for table in arguments.only.split(","):
        print("\n| method | options | KL | predicted | bits a weight | seconds |\n|---|---|---|---|---|---|")
        for method, options in TABLES[table]:
            try:
                row = measure(method, options, arguments.model, texts, arguments.samples)
            except HesseError as error:
                print(f"| `{method}` | {asked(options)} | {str(error).split(':')[0]} | | | |", flush=True)
                continue
            found[named(method, options)] = row
            print(
                f"| `{method}` | {asked(options)} | {row['kl']:.5f} | {row['predicted']:.5f} | {row['bits']:.2f} | "
                f"{row['seconds']:.1f} |",
                flush=True,
            )
    print("\n| claim | setting | KL | against | outcome |\n|---|---|---|---|---|")
    claims = [(claim, (ours, options), (theirs, options)) for claim, ours, theirs, options in CLAIMS]
    for claim, ours, theirs in [*claims, *CLAIMS_ACROSS]:
        both = [found.get(named(*row)) for row in (ours, theirs)]
        if all(both):
            first, second = (operator.itemgetter("kl")(row) for row in both)
            outcome = "holds" if first < second else "does not hold here"
            setting = asked(ours[1]) if ours[1] == theirs[1] else f"{asked(ours[1])} against {asked(theirs[1])}"
            print(f"| {claim} | {setting} | {first:.5f} (`{ours[0]}`) | {second:.5f} (`{theirs[0]}`) | {outcome} |")
    print("\n", limits())


if __name__ == "__main__":
    main()
