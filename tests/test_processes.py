"""Several processes on one job: the same sums, the same answer to rounding, and an end to all when one ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hesse
import tiny_models
from helpers import compress, dense_tensors, fast_first, left_over, sha256, write_ids
from hesse.processes import Processes

FolderOf = Callable[[str], Path]
ROOT = str(Path(hesse.__file__).parents[1])
IDS = tiny_models.random_ids(12, 32)
LONG = 600  # seconds that a process may take on a busy machine


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, **more}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(count: int, *arguments: str | Path) -> list[subprocess.Popen[str]]:
    """`hesse ...` in so many processes that know of one another, as torchrun would start them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "hesse", *map(str, arguments)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code and output of each."""
    printed = [process.communicate(timeout=LONG) for process in processes]
    return [(process.returncode, *both) for process, both in zip(processes, printed, strict=True)]


@pytest.mark.parametrize("number", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_cover_everything_once(number: int, count: int) -> None:
    shares = [Processes(rank, count).shard_of(number) for rank in range(count)]
    assert [place for share in shares for place in share] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def equal_share(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of weights that are equal."""
    equal = sum(int((found[name] == expected[name]).sum()) for name in expected)
    return equal / sum(tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize(
    ("name", "method", "options"),
    fast_first(
        [
            ("llama", "kronecker", ("--bits", "4")),
            ("mixtral", "gptq", ("--bits", "4")),
            ("llama", "sparsegpt", ("--sparsity", "2:4")),
        ]
    ),
)
def test_torchrun_gives_what_one_process_gives(
    name: str, method: str, options: tuple[str, str], family_folder: FolderOf, tmp_path: Path
) -> None:
    """Sums over samples are made in another order, so a weight half-way between two values may go the other way."""
    data = write_ids(tmp_path / "ids.jsonl", IDS)
    arguments = [str(family_folder(name)), str(tmp_path / "out"), "--data", str(data), "--method", method, *options]
    arguments += ["--group-size", "32"] if "--bits" in options else []
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hesse", "compress"]
    done = subprocess.run(
        [*command, *arguments, "--json"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # printed by one of them
    key, value = options[0].removeprefix("--"), options[1]
    own = {key: int(value) if key == "bits" else value, **({"group_size": 32} if key == "bits" else {})}
    alone = compress(family_folder(name), tmp_path / "alone", data=data, method=method, **own)
    assert report["loss"]["predicted"] == pytest.approx(alone.loss.predicted, rel=0.02)
    assert [layer["tokens"] for layer in report["layers"]] == [layer.tokens for layer in alone.layers]
    assert equal_share(dense_tensors(tmp_path / "out"), dense_tensors(tmp_path / "alone")) > 0.98
    assert left_over(tmp_path) == ["out"]


@pytest.mark.slow
def test_one_that_dies_ends_all_and_the_run_goes_on(half_folder: FolderOf, tmp_path: Path) -> None:
    data = write_ids(tmp_path / "ids.jsonl", tiny_models.random_ids(96, 64))
    arguments = ("compress", half_folder("llama"), tmp_path / "out", "--data", data, "--batch-size", "1", "--json")
    first = start(2, *arguments)
    deadline = time.monotonic() + LONG
    while not list(tmp_path.glob(".out.unfinished/journal-1/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first[1].send_signal(signal.SIGKILL)
    (code, _, error), _ = ended(first)
    assert code == 1
    assert "another process of this run has ended" in error
    assert left_over(tmp_path) == [".out.unfinished"]
    again = ended(start(2, *arguments))
    assert [code for code, _, _ in again] == [0, 0], again
    undisturbed = ("compress", half_folder("llama"), tmp_path / "undisturbed", *arguments[3:])
    assert [code for code, _, _ in ended(start(2, *undisturbed))] == [0, 0]
    assert sha256(tmp_path / "out") == sha256(tmp_path / "undisturbed")
    assert left_over(tmp_path) == ["out"]


@pytest.mark.slow
def test_more_processes_than_samples_are_refused(family_folder: FolderOf, tmp_path: Path) -> None:
    data = write_ids(tmp_path / "ids.jsonl", IDS[:1])
    results = ended(start(2, "compress", family_folder("llama"), tmp_path / "out", "--data", data, "--json"))
    assert all(code == 2 and "2 processes cannot share 1 batches" in error for code, _, error in results)
    assert left_over(tmp_path) == []


def test_one_process_shares_with_nobody() -> None:
    alone, tensor = Processes(), torch.ones(3)
    alone.all_reduce(tensor)
    alone.barrier()
    assert torch.equal(alone.all_gather(tensor), torch.ones(3))
    assert (alone.all_reduce_sum(3), alone.all_reduce_min(3), alone.is_main) == (3, 3, True)
