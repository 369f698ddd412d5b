"""Blocks that are read before they are needed: what is announced, and that nothing else changes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hesse.checkpoints.read_ahead import ReadAhead
from hesse.errors import CheckpointError
from hesse.formats import open_checkpoint
from hesse.networks.network import CheckpointNetwork, Network

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def llama(family_folder: Any) -> Network:
    return CheckpointNetwork(open_checkpoint(family_folder("llama")), torch.float32, CPU)


def announced(llama: Network, order: list[int], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The blocks whose bytes the system is asked for while the blocks `order` are loaded, one list a load."""
    file = llama.checkpoint.folder / "model.safetensors"
    header_length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + header_length])
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, size)))
    found = []
    for index in order:
        asked.clear()
        with llama.loaded(llama.blocks[index]):
            pass
        blocks = []
        for number, block in enumerate(llama.blocks):
            entries = [entry["data_offsets"] for name, entry in header.items() if name.startswith(f"{block.name}.")]
            places = [(8 + header_length + start, stop - start) for start, stop in entries]
            if set(places) <= set(asked):
                blocks.append(number)
                assert len(asked) == len(places)
        found.append(blocks)
    return found


def test_the_next_block_is_announced_in_either_direction(llama: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(llama.blocks) == 2
    assert announced(llama, [0, 1, 1, 0, 0, 1], monkeypatch) == [[1], [], [], [], [1], []]
    assert announced(llama, [1, 0], monkeypatch) == [[], []]


def test_a_file_that_changed_is_not_announced(llama: Network) -> None:
    file = llama.checkpoint.folder / "model.safetensors"
    reader, content = ReadAhead(llama.checkpoint, CPU), file.read_bytes()
    try:
        file.write_bytes(content[:9])
        reader.announce(["model.norm.weight"])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            reader.read(["model.norm.weight"])
    finally:
        file.write_bytes(content)


def test_where_the_system_cannot_be_asked_nothing_is(llama: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    reader = ReadAhead(llama.checkpoint, CPU)
    reader.announce(["model.norm.weight"])
    assert set(reader.read(["model.norm.weight"])) == {"model.norm.weight"}


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What would have been pinned, where there is no GPU to pin for."""
    tensors: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return tensors


def test_for_a_gpu_a_thread_reads_what_was_announced(llama: Network, pinned: list[torch.Tensor]) -> None:
    reader = ReadAhead(llama.checkpoint, GPU)
    stored = load_file(llama.checkpoint.folder / "model.safetensors")
    first, second = ["model.norm.weight"], list(stored)[:3]
    reader.announce(second)
    assert torch.equal(reader.read(first)[first[0]], stored[first[0]])  # not what was announced: read as ever
    assert len(pinned) in range(4)
    reader.announce(second)
    found = reader.read(second)
    assert {id(tensor) for tensor in found.values()} <= {id(tensor) for tensor in pinned}
    assert all(torch.equal(found[name], stored[name]) for name in second)
    assert set(reader.read(second)) == set(second)  # once more, without an announcement


def test_an_error_of_the_thread_is_raised_where_its_tensors_are_read(
    llama: Network, pinned: list[torch.Tensor]
) -> None:
    reader = ReadAhead(llama.checkpoint, GPU)
    reader.announce(["no.such.tensor"])
    with pytest.raises(CheckpointError, match=r"no\.such\.tensor"):
        reader.read(["no.such.tensor"])
    assert not pinned


def test_the_folder_is_not_touched(llama: Network, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in llama.checkpoint.folder.iterdir()}
    for block in llama.blocks:
        with llama.loaded(block):
            pass
    assert {path.name: path.stat().st_mtime_ns for path in llama.checkpoint.folder.iterdir()} == before
