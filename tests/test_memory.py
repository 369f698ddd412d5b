"""What is kept on disk comes back bit for bit, and a run stays within the memory that was said before it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hesse
import tiny_models
from helpers import IDS, compress, fast_first, sha256, write_ids
from hesse.checkpoints.tensor_store import InMemory, TensorFile, TensorStore
from hesse.errors import OptionError, OutputError
from hesse.jobs import memory
from hesse.jobs.memory import MemoryBound
from hesse.jobs.options import bytes_of
from hesse.passes.activation_offload import OffloadToDisk

FolderOf = Callable[[str], Path]
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (), (0, 4)])
def test_tensors_wait_in_files_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    shelf = TensorStore(tmp_path)
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(3)]
    tensors[0].view(-1)[:1] = float("nan")
    waiting = [shelf.keep(tensor, 0) for tensor in tensors]
    for tensor, other in zip(tensors, waiting, strict=True):
        found = other.tensor()
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_file_goes_once_nothing_waits_in_it(tmp_path: Path) -> None:
    shelf = TensorStore(tmp_path)
    first, second = shelf.keep(torch.ones(2), 0), shelf.keep(torch.ones(2), 1)
    assert len(list(tmp_path.iterdir())) == 2
    del first
    assert [path.name for path in tmp_path.iterdir()] == ["hidden-1.bin"]
    assert torch.equal(second.tensor(), torch.ones(2))
    del second
    assert list(tmp_path.iterdir()) == []
    assert isinstance(TensorStore().keep(torch.ones(2), 0), InMemory)


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "tensors", CPU, lasting=True)
    file.append(torch.ones(4))
    (tmp_path / "tensors").write_bytes(b"1234")
    with pytest.raises(OutputError, match="shorter than what was written"):
        file.read(0)


def test_a_paused_greenlet_holds_no_memory(tmp_path: Path) -> None:
    """Tensors, views of them and intermediate values on the stack; not what is shared."""
    weight = torch.randn(8, 8)
    sizes: list[int] = []

    def pause(tensor: Tensor) -> Tensor:
        getcurrent().parent.switch(tensor)
        return tensor

    def work(seed: int) -> Tensor:
        first = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        turned, shared = first.T, weight.T
        result = (first + 1) * pause(turned @ shared) + turned
        return result + pause(result[:2]).sum()

    def run(folder: Path | None) -> list[Tensor]:
        found: list[Tensor] = []
        runners = [greenlet(lambda seed=seed: found.append(work(seed))) for seed in range(3)]
        if folder is None:
            while any(not runner.dead for runner in runners):
                for runner in runners:
                    runner.switch()
            return found
        offload = OffloadToDisk(folder, lambda: [weight])
        with torch.inference_mode():
            while any(not runner.dead for runner in runners):
                for runner in runners:
                    said = offload.resume(runner)
                    offload.put_away(runner)
                    sizes.extend([] if said is None else [said.untyped_storage().nbytes()])
                    assert weight.untyped_storage().nbytes() == 256
        return found

    expected, found = run(None), run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert sizes == [0] * 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", fast_first(["llama", "mixtral", "gpt2", "gemma2", "opt", "bert"], 2))
@pytest.mark.parametrize("method", ["kronecker", "gptq"])
def test_activations_on_disk_change_nothing(
    name: str, method: str, half_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": method, "bits": 4, "group_size": 32, "batch_size": 3}
    compress(half_folder(name), tmp_path / "memory", **options)
    plan = MemoryBound(0, 3, True, "")
    monkeypatch.setattr("hesse.jobs.compress_folder.fit_memory", lambda *_: plan)
    compress(half_folder(name), tmp_path / "disk", **options)
    assert sha256(tmp_path / "memory") == sha256(tmp_path / "disk")


def test_the_fastest_way_that_fits_is_taken(family_folder: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {(8, False): 4 << 30, (8, True): 3 << 30, (1, True): 2 << 30}

    def bound(plan: Any, batch_size: int, paused: bool) -> MemoryBound:
        return MemoryBound(bounds[batch_size, paused], batch_size, paused, "solve model.layers.0")

    plan = tiny_plan(family_folder("llama"))
    monkeypatch.setattr(memory, "_bound", bound)
    chosen = [memory.fit_memory(plan, limit) for limit in (5 << 30, 3 << 30, 2 << 30)]
    assert [(choice.batch_size, choice.offloads) for choice in chosen] == [(8, False), (8, True), (1, True)]
    with pytest.raises(OptionError, match=r"--memory 1\.00GiB is not enough .*: 2\.00GiB are, needed to solve model"):
        memory.fit_memory(plan, 1 << 30)
    assert memory.fit_memory(plan, 4 << 30, batch_size=8).batch_size == 8


def tiny_plan(folder: Path) -> Any:
    from hesse.data.selection import Calibration
    from hesse.jobs.setup import open_setup
    from hesse.methods import Options, find_method

    recipe = find_method("kronecker").recipe(Options(bits=4, group_size=32))
    return open_setup(folder, recipe, Calibration(IDS, 8, None, 0, None), None, "auto", CPU)


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 gib", 3 << 29), ("7", 7)])
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["much", "-1GB", "8 gibberish", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="give bytes such as 8GiB"):
        bytes_of(text)


LIMITED = """
import resource, sys, psutil, torch
import hesse
from hesse.jobs import compress_folder, memory

torch.set_num_threads(1)
model, out, data, limit = sys.argv[1:]

def within(plan, limit, batch_size=None, fits=memory.fit_memory):
    chosen = fits(plan, limit, batch_size)
    process = psutil.Process()
    free = chosen.bound - process.memory_info().rss
    data = next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + free, data + free))
    print(chosen.bound, int(chosen.offloads), free)
    return chosen

compress_folder.fit_memory = within
report = hesse.compress(model, out, data=data, options=hesse.Options(bits=4, group_size=64),
                        method="gptq", memory=limit, overwrite=True).report
print(report.peak_rss_bytes)
"""


def within_limit(model: Path, out: Path, data: Path, limit: str) -> tuple[int, bool, int]:
    """Compress in a process whose memory the system limits to the bound: the bound, where activations are, the peak."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux limits a process's data")
    command = [sys.executable, "-c", LIMITED, str(model), str(out), str(data), limit]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(hesse.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    bound, paused, _, peak = map(int, done.stdout.split())
    return bound, bool(paused), peak


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose activations on a few hundred samples are larger than everything else."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_run_stays_within_its_bound_under_a_hard_limit(wide_model: Path, tmp_path: Path) -> None:
    """The system refuses memory beyond the bound; so many samples more change neither it nor the peak."""
    data = [write_ids(tmp_path / f"{count}.jsonl", tiny_models.random_ids(count, 128)) for count in (64, 384)]
    few, few_paused, few_peak = within_limit(wide_model, tmp_path / "out", data[0], "4GiB")
    limit = few + (30 << 20)
    many, many_paused, many_peak = within_limit(wide_model, tmp_path / "out", data[1], str(limit))
    assert (few_paused, many_paused) == (False, True)
    assert few_peak <= few
    assert many_peak <= many <= limit


def test_planning_a_budget_stays_within_the_bound_too(wide_model: Path, tmp_path: Path) -> None:
    """Planning calibrates 32 samples, whose activations take more than the run has with one sample at a time."""
    data = write_ids(tmp_path / "ids.jsonl", tiny_models.random_ids(32, 128))
    plans = [
        hesse.compress(wide_model, tmp_path / name, data=data, method="gptq", size="60%", memory=memory).report
        for name, memory in (("free", None), ("limited", "4GiB"))
    ]
    assert plans[0].recipe == plans[1].recipe
    assert plans[0].loss == plans[1].loss
    with pytest.raises(OptionError, match="--memory 1MiB is not enough"):
        hesse.compress(wide_model, tmp_path / "no", data=data, method="gptq", size="60%", memory="1MiB")
    assert not (tmp_path / "no").exists()
