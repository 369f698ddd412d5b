"""Benchmark models in runtimes: each measurement is a process of its own, and the models alternate."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
import torch

from hesse.checkpoints.locate import locate
from hesse.data import read_samples
from hesse.errors import HesseError, OptionError, check_at_least
from hesse.formats import open_checkpoint
from hesse.progress import Progress, Silence
from hesse.result import Result
from hesse.runtimes import worker
from hesse.runtimes.benchmark_result import Benchmark, BenchmarkRow, MissingRun, TimedRun
from hesse.runtimes.export import export_checkpoint
from hesse.runtimes.exported_layers import read_config
from hesse.runtimes.programs import RUNTIMES, Runtime, describe_storage, find_runtimes
from hesse.runtimes.worker import Floats, Measurement, Request
from hesse.version import __version__

WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "*.pt")
# The current folder is removed from the module path: it may be a model's folder, with code in it.
START = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)


@dataclass
class _MeasuredModel:
    """A model in the form that a runtime loads, with the results of its processes."""

    runtime: Runtime
    model: str  # "dense" or "compressed"
    path: Path
    stored: str
    measurements: list[Measurement] = field(default_factory=list)
    logits: Floats | None = None
    failure: str | None = None  # the reason why a process failed

    @property
    def bytes(self) -> int:
        """Return the size of its weights on disk, in bytes."""
        files = [self.path] if self.path.is_file() else [file for form in WEIGHTS for file in self.path.glob(form)]
        return sum(file.stat().st_size for file in files)


def benchmark(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    runtimes: Sequence[str] = tuple(RUNTIMES),
    prompt: int = 128,
    generate: int = 64,
    threads: int | None = None,
    repeats: int = 3,
    progress: Progress | None = None,
) -> Result[Benchmark]:
    """Measure how fast a model loads, reads a prompt and decodes in each runtime on this machine, and its memory.

    Each measurement is a process of its own; the models alternate. Models are first exported to a temporary folder in
    the form that a runtime needs; the export does not count in the time.

    Args:
        model: a model folder, `default`, or a hub id; dense or compressed.
        reference: the dense model to compare with.
        runtimes: any of `transformers`, `llama.cpp`, `onnxruntime`, `torchao`; the report lists the uninstalled ones.
        prompt: number of tokens of the prompt.
        generate: number of tokens to decode.
        threads: threads of each runtime; None for the number of processors.
        repeats: number of processes per measurement.
        progress: receives each phase and step.

    Returns:
        Medians and spreads, and each runtime's divergence from the same checkpoint in transformers.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do: a model cannot be read, or has too few
            positions for the sequence.
    """
    for option, value in (
        ("--prompt", prompt),
        ("--generate", generate),
        ("--repeats", repeats),
        ("--threads", threads),
    ):
        check_at_least(option, value, 1)
    started = time.perf_counter()
    chosen = find_runtimes(list(runtimes))
    threads = threads or _processor_count()
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    measured = locate(model)
    models = _models(measured, None if reference is None else locate(reference))
    tokens = _prompt(measured, prompt)
    for folder in models.values():
        _check_length(folder, prompt + generate + 1)
    missing = [MissingRun(runtime.name, reason) for runtime in chosen if (reason := runtime.missing()) is not None]
    absent = {entry.runtime for entry in missing}
    with tempfile.TemporaryDirectory(prefix="hesse-benchmark-") as scratch:
        entries: list[_MeasuredModel] = []
        for runtime in (runtime for runtime in chosen if runtime.name not in absent):
            for kind, folder in models.items():
                if kind == "dense" and runtime.compressed_only:
                    continue
                try:
                    entries.append(_prepare(runtime, kind, folder, Path(scratch)))
                except HesseError as error:
                    missing.append(MissingRun(runtime.name, f"{kind}: {error}"))
        progress = progress or Silence()
        progress.begin("measure", repeats * len(entries))
        for repeat in range(repeats):
            for entry in entries:
                if entry.failure is None:
                    _run(entry, tokens, generate, threads, Path(scratch), with_logits=repeat == 0)
                progress.advance()
        truth = {entry.model: entry.logits for entry in entries if entry.runtime.name == "transformers"}
        rows = [_row(entry, truth.get(entry.model)) for entry in entries if entry.failure is None]
    missing += [MissingRun(e.runtime.name, f"{e.model}: {e.failure}") for e in entries if e.failure is not None]
    result = Benchmark(
        verb="benchmark",
        model=str(model),
        reference=None if reference is None else str(reference),
        prompt=prompt,
        generate=generate,
        threads=threads,
        repeats=repeats,
        processor=_processor_name(),
        processors=os.cpu_count() or 1,
        load_average=load_average,
        seconds={"total": time.perf_counter() - started},
        versions={"hesse": __version__, "torch": torch.__version__, "python": platform.python_version()},
        rows=rows,
        missing=missing,
    )
    return Result(result)


def _models(model: Path, reference: Path | None) -> dict[str, Path]:
    """Return the folders to measure by kind, the dense model first."""
    if reference is not None:
        return {"dense": reference, "compressed": model}
    return {"compressed" if open_checkpoint(model).config.get("quantization_config") else "dense": model}


def _prompt(model: Path, length: int) -> list[int]:
    """Return the first tokens of the shipped held-out text, or random tokens if the folder has no tokenizer."""
    if not (model / "tokenizer.json").is_file():
        vocabulary = read_config(open_checkpoint(model)).vocab_size
        return [int(token) for token in np.random.default_rng(0).integers(0, vocabulary, length)]
    samples, _ = read_samples(None, model, count=1, length=length, seed=0, purpose="evaluation", limit=None)
    return [int(token) for token in samples.ids[0]]


def _check_length(model: Path, length: int) -> None:
    limit = getattr(read_config(open_checkpoint(model)), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise OptionError(
            f"--prompt and --generate need {length} positions, but {model} has {limit}: give fewer tokens"
        )


def _prepare(runtime: Runtime, kind: str, folder: Path, scratch: Path) -> _MeasuredModel:
    """Export the model to `scratch` in the form that the runtime loads."""
    if runtime.target is None:
        return _MeasuredModel(runtime, kind, folder, describe_storage(folder))
    out = scratch / (f"{kind}.gguf" if runtime.target == "gguf" else f"{kind}-{runtime.target}")
    report = export_checkpoint(
        folder, out, runtime.target, overwrite=False, progress=Silence(), name=folder.name, version=""
    )
    stored = report.stored or report.dense
    return _MeasuredModel(runtime, kind, out, max(stored, key=lambda name: stored[name]))


def _run(
    entry: _MeasuredModel,
    tokens: list[int],
    generate: int,
    threads: int,
    scratch: Path,
    *,
    with_logits: bool,
) -> None:
    """Measure once in a new process, and add the result to `entry`."""
    path, logits = scratch / "request.json", scratch / "logits.npy"
    request = Request(
        entry.runtime.name, str(entry.path), tokens, generate, threads, str(logits) if with_logits else None
    )
    path.write_text(json.dumps(asdict(request)), encoding="utf-8")
    path.with_suffix(".result").unlink(missing_ok=True)
    search = [str(Path(worker.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, search))}
    done = subprocess.run(
        [sys.executable, "-c", START, worker.__file__, str(path)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        entry.failure = lines[-1].strip() if lines else f"the process ended with {done.returncode}"
        return
    entry.measurements.append(Measurement(**json.loads(path.with_suffix(".result").read_text(encoding="utf-8"))))
    if with_logits:
        entry.logits = np.load(logits, allow_pickle=False)


def _row(entry: _MeasuredModel, truth: Floats | None) -> BenchmarkRow:
    kl, agreement = (None, None) if truth is None or entry.logits is None else _agreement(truth, entry.logits)
    return BenchmarkRow(
        runtime=entry.runtime.name,
        model=entry.model,
        version=package_version(entry.runtime.distribution),
        stored=entry.stored,
        bytes=entry.bytes,
        load_seconds=TimedRun.of([m.load_seconds for m in entry.measurements]),
        prefill=TimedRun.of([m.prefill for m in entry.measurements]),
        decode=TimedRun.of([m.decode for m in entry.measurements]),
        peak_memory=TimedRun.of([m.peak_memory for m in entry.measurements]),
        kl=kl,
        top1_agreement=agreement,
    )


def _agreement(truth: Floats, logits: Floats) -> tuple[float, float]:
    """Return the mean KL(truth || logits) in nats per token, and the share of tokens with the same largest logit."""
    expected, actual = (torch.from_numpy(values).double().log_softmax(-1) for values in (truth, logits))
    kl = (expected.exp() * (expected - actual)).sum(-1).mean()
    return float(kl), float((expected.argmax(-1) == actual.argmax(-1)).double().mean())


def _processor_count() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    """Return the processor's name."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
