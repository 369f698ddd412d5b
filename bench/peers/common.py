"""Command line, calibration input and report shared by the peer runners.

Every runner is started as ``python bench/peers/run_PEER.py ...`` inside the peer's own virtual environment, so this
module may only use packages which all the peers depend on.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def peak_rss_bytes() -> int:
    """Return the largest resident set size of this process so far.

    ``VmHWM`` starts anew at exec, whereas ``ru_maxrss`` can carry over the size of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Sparsity:
    """A pruning target: a fraction of zero weights, with an ``N:M`` pattern when ``pattern`` is not ``None``."""

    fraction: float
    pattern: str | None = None

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """Read ``0.5`` (half of the weights are zero) or ``2:4`` (two of every four weights are zero)."""
        if ":" not in text:
            value = float(text)
            if not 0.0 < value < 1.0:
                raise argparse.ArgumentTypeError(f"sparsity must lie between 0 and 1, got {text}")
            return cls(value)
        zeros, block = (int(part) for part in text.split(":"))
        if not 0 < zeros < block:
            raise argparse.ArgumentTypeError(f"sparsity pattern must be N:M with 0 < N < M, got {text}")
        return cls(zeros / block, text)


@dataclass
class Report:
    """What a runner prints: two durations in seconds, the settings which were used and the peak memory when created."""

    peer: str
    method: str
    seconds: float
    seconds_with_io: float
    settings: dict[str, Any]
    peak: int = field(default_factory=peak_rss_bytes)

    def emit(self) -> None:
        """Write the report to standard output as one line of JSON, after everything the peer has printed."""
        line = {
            "peer": self.peer,
            "version": version(self.peer),
            "method": self.method,
            "seconds": round(self.seconds, 3),
            "seconds_with_io": round(self.seconds_with_io, 3),
            "peak_rss_bytes": self.peak,
            "settings": {**self.settings, "threads": torch.get_num_threads(), "torch": torch.__version__},
        }
        sys.stderr.flush()
        print("\n" + json.dumps(line), flush=True)


def parse_arguments(methods: tuple[str, ...], description: str | None) -> argparse.Namespace:
    """Parse the command line which all the runners share and set the number of threads of torch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--ids", type=Path, required=True, help="JSON lines, one object with input_ids a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the compressed checkpoint")
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sparsity", type=Sparsity.parse, default=Sparsity(0.5), help="a fraction or N:M")
    parser.add_argument("--iterations", type=int, default=200, help="optimisation steps a block (autoround)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples a batch (llmcompressor)")
    parser.add_argument("--threads", type=int, default=2, help="number of threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def read_ids(path: Path) -> list[list[int]]:
    """Read the calibration samples, which must all have the same length so that no peer pads or cuts them."""
    with path.open(encoding="utf-8") as lines:
        samples = [json.loads(line)["input_ids"] for line in lines if line.strip()]
    if len({len(sample) for sample in samples}) != 1:
        raise ValueError(f"{path} must hold at least one sample, and all of the same length")
    return samples


def copy_tokenizer(model: Path, out: Path) -> None:
    """Copy the tokenizer files unchanged, since some peers need an altered tokenizer during calibration."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"):
        if (model / name).exists():
            shutil.copyfile(model / name, out / name)
