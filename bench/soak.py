"""A hundred compressions of tiny models of every family by random valid options, each loaded back and compared.

    python bench/soak.py [--runs 100] [--seed 0]

Every result is loaded by plain transformers, whose loss (an encoder's hidden states) must be what `hesse.evaluate`
finds. At the end memory and open files must not have grown, and no temporary file may be left; temporary files go to a
folder of this program's own, as other programs write to the system's. The exit code is 1 if anything grew or was left.
"""

import argparse
import gc
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import psutil
import torch
from torch import Tensor, nn

import hesse
import tiny_models
from hesse.errors import OptionError

WARM = 30  # runs after which libraries have taken what they keep
GROWTH = 24 << 20  # bytes of memory that may come and go
LENGTHS = (9, 32, 57)
TOLERANCE = 2e-4  # nats per token, or of a hidden state's square: float32 against float32 in another order


def draw(generator: random.Random) -> tuple[str, dict[str, Any]]:
    """A method and options that it has; some are refused for some models."""
    kind = generator.choice(["grid", "grid", "sparse", "both", "low rank", "planned"])
    grid = {
        "bits": generator.choice([2, 3, 4, 5, 8]),
        "group_size": generator.choice([16, 32, -1]),
        "symmetric": generator.choice([True, True, False]),
    }
    zeros = {"sparsity": generator.choice([0.3, 0.5, "2:4", "1:4"])}
    if kind == "grid":
        return generator.choice(["rtn", "gptq", "kronecker"]), {"options": hesse.Options(**grid)}
    if kind == "sparse":
        return generator.choice(["magnitude", "wanda", "sparsegpt"]), {"options": hesse.Options(**zeros)}
    if kind == "both":
        both = hesse.Options(**{**grid, **zeros, "symmetric": None})
        return generator.choice(["gptq", "sparsegpt"]), {"options": both}
    if kind == "low rank":
        rank = hesse.Options(rank=generator.choice([2, 8, 24]))
        return generator.choice(["svd", "activation-svd"]), {"options": rank}
    budget = generator.choice([{"size": "60%"}, {"mean_bits": 3.3}, {"mean_bits": 4.5}, {"loss": 0.01}])
    return generator.choice(["gptq", "rtn"]), budget


def difference(family: str, out: Path, source: Path, ids: list[list[int]]) -> float:
    """How far what transformers makes of a checkpoint is from what Hesse says it makes."""
    found = hesse.evaluate(out, reference=source, data=ids).report
    model, dense = tiny_models.load(family, out), tiny_models.load(family, source)
    batch = torch.tensor(ids)
    with torch.no_grad():
        if found.model_loss is None:
            outputs = (each(input_ids=batch, output_hidden_states=True) for each in (model, dense))
            hidden: list[Tensor] = [output.hidden_states[-1] for output in outputs]
            error = 0.5 * (hidden[0] - hidden[1]).double().square().sum(-1).mean()
            assert found.hidden_error is not None
            return abs(float(error) - found.hidden_error) / max(float(error), 1.0)
        logits = model(input_ids=batch).logits[:, :-1].double()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    return abs(float(loss) - found.model_loss)


def own_temporary_folder(folder: Path) -> None:
    """Make `folder`, and have this process and those that it starts write their temporary files there."""
    folder.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def state() -> tuple[int, int, set[str]]:
    """Return memory, the number of open files, and the names in this program's folder for temporary files."""
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), set(os.listdir(tempfile.gettempdir()))


def main() -> None:
    """Run the loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    generator, done, refused, worst = random.Random(arguments.seed), Counter[str](), 0, 0.0
    families = list(tiny_models.FAMILIES)
    with tempfile.TemporaryDirectory() as scratch:
        own_temporary_folder(Path(scratch) / "temporary")
        sources = {name: tiny_models.save(name, Path(scratch) / name) for name in families}
        before = after_warming = state()
        number = 0
        while number < arguments.runs:
            family = families[number % len(families)]
            method, options = draw(generator)
            length = generator.choice(LENGTHS)
            ids = tiny_models.random_ids(generator.choice([4, 9]), length, seed=generator.randrange(1000))
            out = Path(scratch) / "out"
            try:
                settings: dict[str, Any] = {"batch_size": generator.choice([None, 1, 3]), "data": ids, **options}
                hesse.compress(sources[family], out, method=method, **settings, overwrite=True)
            except OptionError:
                refused += 1
                continue
            if method not in ("svd", "activation-svd"):  # loading those runs code that they bring
                found = difference(family, out, sources[family], tiny_models.random_ids(3, 24, seed=number))
                worst = max(worst, found)
                assert found < TOLERANCE, f"{family} by {method} {options}: {found}"
            left = [path.name for path in Path(scratch).iterdir() if path.name.startswith(".")]
            assert not left, f"{family} by {method} left {left}"
            done[method] += 1
            number += 1
            if number == min(WARM, arguments.runs):
                after_warming = state()
            if number % 10 == 0:
                memory, files, _ = state()
                print(f"{number} runs, {refused} refused: {memory >> 20} MiB, {files} files open", flush=True)
        after = state()
        left_over = after[2] - before[2]
    print(f"by method: {dict(done)}; largest difference from transformers {worst:.1e}")
    print(f"memory {after_warming[0] >> 20} -> {after[0] >> 20} MiB, files {after_warming[1]} -> {after[1]}")
    print(f"temporary files left: {sorted(left_over) or 'none'}")
    if after[0] > after_warming[0] + GROWTH or after[1] > after_warming[1] or left_over:
        sys.exit("something grew, or was left")


if __name__ == "__main__":
    main()
