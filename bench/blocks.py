"""What whole blocks cost on one model: by each importance, at random, made of blocks that stay; and hidden units.

    python bench/blocks.py [--model FOLDER] [--samples 16] [--blocks 1,2,3]

Prints Markdown: KL(dense || without) in nats per token on held-out text, and parameters that are left to store.
"""

import argparse
import random
import tempfile
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import limits
from run import LENGTH, SAMPLES

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.data.selection import Calibration, select_samples
from hesse.formats import open_networks
from hesse.progress import Silence
from hesse.scores.blocks import Removals

RANDOM = 5  # choices of blocks


def measured(out: Path, model: Path, held_out: Path | None) -> float:
    """KL on held-out text."""
    found = hesse.evaluate(out, reference=model, data=held_out, samples=SAMPLES, length=LENGTH).report
    assert found.kl is not None
    return found.kl


def at_random(model: Path, number: int, data: Path | None, samples: int) -> list[float]:
    """KL on the scored samples without blocks that a die chose."""
    _, network, _ = open_networks(model, torch.device("cpu"))
    selected = select_samples(model, Calibration(data, samples, LENGTH, 0, None), network)
    every = list(combinations(range(len(network.blocks)), number))
    chosen = random.Random(0).sample(every, min(RANDOM, len(every)))
    with tempfile.TemporaryDirectory() as folder:
        removals = Removals(network, selected.samples.batches(4), Path(folder), Silence())
        found = []
        for *first, last in chosen:
            kept = [k for k in range(len(network.blocks)) if k not in first]
            found.append(removals.without(kept, [last])[last].value)
    return found


def main() -> None:
    """Run it all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--blocks", default="1,2,3")
    arguments = parser.parse_args()
    shipped = arguments.model == DEFAULT_FOLDER
    texts = (None, None) if shipped else (arguments.model / "calibration.txt", arguments.model / "held_out.txt")
    settings: dict[str, Any] = {"data": texts[0], "samples": arguments.samples, "length": LENGTH}
    depth = len(open_networks(arguments.model, torch.device("cpu"))[1].blocks)
    print("| blocks | chosen by | which | KL | parameters |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        for number in map(int, arguments.blocks.split(",")):
            for options in (
                *({"method": kind} for kind in ("loss", "quadratic", "cosine")),
                *({"method": "flexigpt", "rank": rank} for rank in (16, 64)),
            ):
                chosen: dict[str, Any] = {"what": "blocks", "keep": 1 - number / depth, **options}
                report = hesse.prune(arguments.model, out, **chosen, **settings, overwrite=True).report
                said = ", ".join(f"{key} {value}" for key, value in options.items())
                which = " ".join(
                    str(drop.block) + ("" if drop.donor is None else f"←{drop.donor}") for drop in report.removed
                )
                kept = 100 * report.parameters_after / report.parameters_before
                kl = measured(out, arguments.model, texts[1])
                print(f"| {number} | {said} | {which} | {kl:.4f} | {kept:.1f} % |", flush=True)
            found = at_random(arguments.model, number, texts[0], arguments.samples)
            print(
                f"| {number} | at random, {len(found)} times | | {mean(found):.4f} (least {min(found):.4f}) | |",
                flush=True,
            )
        for number in (1, 2):  # the same blocks factorised, without a stand-in
            victims = [
                drop.block
                for drop in hesse.prune(
                    arguments.model, out, what="blocks", keep=1 - number / depth, **settings, overwrite=True
                ).report.removed
            ]
            for rank in (16, 64):
                _, network, _ = open_networks(arguments.model, torch.device("cpu"))
                stay = [f"*.{k}.*" for k in range(len(network.blocks)) if k not in victims]
                hesse.compress(
                    arguments.model,
                    out,
                    method="activation-svd",
                    options=hesse.Options(rank=rank),
                    ignore=stay,
                    overwrite=True,
                    **settings,
                )
                print(
                    f"| {number} | factorised, rank {rank} | {victims} | "
                    f"{measured(out, arguments.model, texts[1]):.4f} | |",
                    flush=True,
                )
        for keep in (0.9, 0.75, 0.5):
            narrow = hesse.prune(arguments.model, out, what="hidden", keep=keep, overwrite=True, **settings).report
            kept = 100 * narrow.parameters_after / narrow.parameters_before
            kl = measured(out, arguments.model, texts[1])
            print(f"| 0 | {keep} of the hidden units, refitted | | {kl:.4f} | {kept:.1f} % |", flush=True)
    print("\n", limits())


if __name__ == "__main__":
    main()
