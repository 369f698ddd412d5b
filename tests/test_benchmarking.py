"""A benchmark measures in processes of its own, says what is missing, and asserts nothing about the clock."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import hesse
import tiny_models
from helpers import CommandLine, compress
from hesse.errors import OptionError
from hesse.runtimes import programs
from hesse.runtimes.benchmark import _agreement
from hesse.runtimes.benchmark_result import Benchmark, BenchmarkRow, TimedRun

FolderOf = Callable[[str], Path]
SHORT = {"prompt": 8, "generate": 2, "threads": 1, "repeats": 1}


def row(runtime: str, model: str, decode: float) -> BenchmarkRow:
    measured = TimedRun.of([decode])
    return BenchmarkRow(runtime, model, "1", "BF16", 1, measured, measured, measured, measured, None, None)


def result(*rows: BenchmarkRow) -> Benchmark:
    return Benchmark(
        verb="benchmark",
        model="m",
        reference="d",
        prompt=8,
        generate=2,
        threads=1,
        repeats=1,
        processor="processor",
        processors=2,
        load_average=0.0,
        rows=list(rows),
        missing=[],
    )


def test_the_median_and_the_spread() -> None:
    assert TimedRun.of([3.0, 1.0, 2.0]) == TimedRun(2.0, 1.0, 3.0)


def test_speed_is_compared_in_one_runtime_and_torchao_with_transformers() -> None:
    found = result(
        row("transformers", "dense", 2.0),
        row("llama.cpp", "dense", 4.0),
        row("llama.cpp", "compressed", 10.0),
        row("torchao", "compressed", 3.0),
    )
    assert found.speed_up("llama.cpp") == 2.5
    assert found.speed_up("torchao") == 1.5
    assert found.speed_up("transformers") is None
    assert found.speed_up("onnxruntime") is None


def test_agreement_of_logits() -> None:
    import numpy as np

    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    assert _agreement(logits, logits + 3) == pytest.approx((0, 1), abs=1e-6)
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32))
    assert _agreement(logits, other) == pytest.approx((0.5 * 0.25 * np.log(2), 0.5), abs=1e-6)


@pytest.mark.slow
def test_transformers_dense_and_compressed(half_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    compress(source, out, method="rtn", bits=4, group_size=32)
    arguments = [text for name, value in SHORT.items() for text in (f"--{name}", str(value))]
    ran = hesse_command("benchmark", out, "--reference", source, "--runtimes", "transformers", *arguments, "--json")
    assert (ran.code, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    assert [(r["model"], r["stored"]) for r in found["rows"]] == [("dense", "bfloat16"), ("compressed", "4 bit")]
    assert found["missing"] == []
    for entry in found["rows"]:
        for name in ("load_seconds", "prefill", "decode", "peak_memory"):
            assert entry[name]["lowest"] == entry[name]["median"] == entry[name]["highest"] > 0
        assert entry["peak_memory"]["median"] > 10**8  # a process with torch in it
        assert (entry["kl"], entry["top1_agreement"]) == (0, 1)  # itself
        folder = source if entry["model"] == "dense" else out
        assert entry["bytes"] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "package"), [("llama.cpp", "llama_cpp"), ("onnxruntime", "onnxruntime"), ("torchao", "torchao")]
)
def test_each_runtime_agrees_with_transformers(name: str, package: str, half_folder: FolderOf, tmp_path: Path) -> None:
    pytest.importorskip(package)
    out = tmp_path / "out"
    compress(half_folder("llama"), out, method="rtn", bits=4, group_size=32)
    found = hesse.benchmark(out, runtimes=[name, "transformers"], **SHORT).report
    assert found.missing == []
    assert [(r.runtime, r.model) for r in found.rows] == [("transformers", "compressed"), (name, "compressed")]
    kl = found.rows[1].kl
    assert kl is not None
    assert 0 <= kl < 0.01


def test_what_is_not_installed_is_listed(
    half_folder: FolderOf, hesse_command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    ran = hesse_command("benchmark", half_folder("llama"), "--prompt", "8", "--generate", "2")
    assert ran.code == 0
    text = " ".join(ran.stdout.split())
    assert "llama.cpp: llama_cpp and gguf not installed: pip install 'hesse[gguf]' llama-cpp-python" in text
    assert "pip install 'hesse[torchao]'" in text


def test_a_family_that_a_runtime_does_not_have_is_listed(
    half_folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(programs.Runtime, "missing", lambda self: None)
    found = hesse.benchmark(half_folder("gemma2"), runtimes=["llama.cpp"], **SHORT).report
    assert found.rows == []
    (missing,) = found.missing
    assert (missing.runtime, "GGUF of the family 'gemma2' is not written" in missing.reason) == ("llama.cpp", True)


def test_bad_input(half_folder: FolderOf, hesse_command: CommandLine) -> None:
    folder = half_folder("llama")
    with pytest.raises(OptionError, match=r"there is no runtime 'vllm'; there are transformers, "):
        hesse.benchmark(folder, runtimes=["vllm"])
    with pytest.raises(OptionError, match=r"need 193 positions, but .* has 128"):
        hesse.benchmark(folder)
    with pytest.raises(OptionError, match="--repeats is 0"):
        hesse.benchmark(folder, repeats=0)
    assert tiny_models.POSITIONS == 128
    ran = hesse_command("benchmark", "./nothing")
    assert (ran.code, "is not a folder" in ran.error) == (1, True)
