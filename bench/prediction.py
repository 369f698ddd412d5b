"""How far predictions of loss increase can be trusted: measured over predicted, on many models and schemes.

`python bench/prediction.py OUT` writes Markdown tables, from which the band in `evaluation/measurements.py` was drawn,
to OUT/prediction.md, and a report of each compression of the default model beside them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import hesse
import tiny_models
from hesse import Options
from hesse.evaluation.measurements import Measurements
from hesse.jobs.report import CompressionReport
from hesse.reporting import compression_page

# What is done to the default model: name, method, options.
SCHEMES: Sequence[tuple[str, str, Options]] = (
    *(
        (f"{method}, {bits} bits, groups of {group}", method, Options(bits=bits, group_size=group))
        for method in ("kronecker", "gptq")
        for bits, group in ((8, 64), (4, 64), (3, 64), (2, 32))
    ),
    ("rtn, 4 bits, groups of 64", "rtn", Options(bits=4, group_size=64)),
    ("sparsegpt, 50 % zeros", "sparsegpt", Options(sparsity=0.5)),
    ("sparsegpt, 2:4", "sparsegpt", Options(sparsity="2:4")),
    ("activation-svd, rank 96", "activation-svd", Options(rank=96)),
)
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe")
KINDS = {
    "dense language models": [n for n in tiny_models.FAMILIES if n not in (*MIXTURES, *tiny_models.ENCODERS)],
    "encoders": list(tiny_models.ENCODERS),
    "mixtures of experts": list(MIXTURES),
}
BITS = (8, 4, 3, 2)


def main(out: Path) -> None:
    """Run everything and write it to `out`."""
    lines = ["| scheme | KL | most likely token | ratio | ratio, layers: least, median, most | outside | holds up to |"]
    lines.append("|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for number, (name, method, options) in enumerate(SCHEMES):
            target = Path(folder) / str(number)
            report = hesse.compress("default", target, method=method, options=options, samples=64, measure=True).report
            (out / f"{number}.html").write_text(compression_page(report), encoding="utf-8")
            lines.append(_row(name, measured(report)))
            print(lines[-1], flush=True)
        lines += ["", "| tiny random models | bits | ratio, least to most | ratio, layers, 90 % of them | most |"]
        lines.append("|---|---|---|---|---|")
        for kind, families in KINDS.items():
            for bits in BITS:
                lines.append(_family_row(kind, families, bits, Path(folder)))
                print(lines[-1], flush=True)
    (out / "prediction.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, found: Measurements) -> str:
    ratios, outside = layer_ratios(found), sum(group.outside for group in found.layers)
    agreement = 100 * (found.check.top1_agreement or 0.0)
    return (
        f"| {name} | {found.whole.measured.value:.2g} | {agreement:.1f} % | {found.whole.ratio:.2f} | "
        f"{min(ratios):.2f}, {median(ratios):.2f}, {max(ratios):.2f} | {outside} of {len(found.layers)} | "
        f"{found.holds_up_to} |"
    )


def _family_row(kind: str, families: Sequence[str], bits: int, folder: Path) -> str:
    wholes: list[float] = []
    layers: list[float] = []
    for family in families:
        source = tiny_models.save(family, folder / family)
        target, options = folder / f"{family}-{bits}", Options(bits=bits, group_size=32)
        data: Any = tiny_models.random_ids(12, 64)
        found = measured(hesse.compress(source, target, options=options, data=data, measure=True).report)
        wholes.append(found.whole.ratio or 0.0)
        layers += layer_ratios(found)
    layers.sort()
    cut = len(layers) // 20
    return (
        f"| {kind} ({len(families)}) | {bits} | {min(wholes):.2f} to {max(wholes):.2f} | "
        f"{layers[cut]:.2f} to {layers[-1 - cut]:.2f} | {layers[-1]:.2f} |"
    )


def measured(report: CompressionReport) -> Measurements:
    """What was measured, which is there since it was asked for."""
    assert report.measurements is not None
    return report.measurements


def layer_ratios(found: Measurements) -> list[float]:
    """Measured over predicted of each layer alone, where the cost is more than two of its standard errors."""
    certain = [group for group in found.layers if group.measured.value > 2 * group.measured.standard_error]
    return [group.ratio for group in certain if group.ratio is not None]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    main(target)
