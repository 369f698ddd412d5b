"""One ranking for any size against one rank for all layers: `python bench/any_size.py`."""

import tempfile
from pathlib import Path
from typing import Any

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.errors import HesseError

SAMPLES, LENGTH = 64, 256


def uniform_rank(shapes: list[tuple[int, int]], share: float) -> int:
    """The largest rank with which factors of all layers take such a share of their parameters."""
    return int(share * sum(rows * columns for rows, columns in shapes) / sum(map(sum, shapes)))


def row(name: str, report: Any, out: Path) -> None:
    """Evaluate on held-out text, and print."""
    kl = hesse.evaluate(out, reference="default", samples=SAMPLES, length=LENGTH).report.kl
    print(f"| {name} | {kl:.5f} | {report.loss.predicted:.5f} |", flush=True)


def main() -> None:
    """Print a table."""
    print("| method | KL | predicted |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hesse.estimate("default", folder / "st", curvatures=("gram", "kronecker"), samples=SAMPLES, length=LENGTH)
        for share in (90, 80, 60):
            out = folder / f"cut-{share}"
            report = hesse.compress("default", out, method="acip", size=f"{share}%", statistics=folder / "st").report
            row(f"`acip` {share} %", report, out)
            rank = uniform_rank([layer.shape for layer in report.layers] + kept(report), share / 100)
            for method in ("activation-svd", "kronecker-svd"):
                out = folder / f"{method}-{share}"
                options = hesse.Options(rank=rank)
                try:
                    given = hesse.compress(
                        "default", out, method=method, options=options, statistics=folder / "st"
                    ).report
                except HesseError as error:
                    print(f"| `{method}`, rank {rank} | refused: {error} | |", flush=True)
                    continue
                row(f"`{method}`, rank {rank}", given, out)


def kept(report: Any) -> list[tuple[int, int]]:
    """The shapes of the layers that stayed dense."""
    from safetensors import safe_open

    changed = {layer.name for layer in report.layers}
    with safe_open(DEFAULT_FOLDER / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    own = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    return [(shape[0], shape[1]) for name, shape in own.items() if name not in changed]


if __name__ == "__main__":
    main()
