"""Shards that are joined from parts hold the very tensors that were added."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints import writer
from hesse.checkpoints.checkpoint import INDEX, SINGLE
from hesse.errors import VerificationError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.bool]
shapes = st.sampled_from([(), (0,), (1,), (3,), (5, 7), (2, 3, 4)])
tensors = st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=5)


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(tensors, min_size=1, max_size=4),
    shard_bytes=st.sampled_from([1, 100, 1 << 30]),
    large_bytes=st.sampled_from([1, 50, 1 << 30]),
)
def test_what_was_added_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[list[tuple[torch.dtype, tuple[int, ...]]]],
    shard_bytes: int,
    large_bytes: int,
) -> None:
    folder, beside = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("parts")
    added: dict[str, Tensor] = {}
    written = []
    for number, part in enumerate(parts):
        own = {f"{number}.{i}": filled(dtype, shape, 10 * number + i) for i, (dtype, shape) in enumerate(part)}
        written.append(writer.write_part(beside / f"{number}", own))
        added |= own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", shard_bytes)
        patch.setattr(writer, "LARGE_BYTES", large_bytes)
        writer.assemble(written, folder)
        before = contents(folder)
        writer.assemble(written, folder)
    assert contents(folder) == before
    read = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert read.keys() == added.keys()
    assert all(same(read[name], added[name]) for name in added)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        assert all(name in load_file(folder / shard) for name, shard in index["weight_map"].items())
        assert index["weight_map"].keys() == added.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in added.values())
        assert not (folder / SINGLE).exists()
    else:
        assert [path.name for path in folder.iterdir()] == [SINGLE]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_flipped_byte_of_any_tensor_is_named(name: str, tmp_path: Path) -> None:
    stored = {"a": torch.ones(4), "b": torch.ones((), dtype=torch.int64), "c": torch.ones(2, 3, dtype=torch.int8)}
    part = writer.write_part(tmp_path / "part", stored)
    (tmp_path / "out").mkdir()
    writer.assemble([part], tmp_path / "out")
    writer.check_assembled([part], tmp_path / "out")
    with safe_open(tmp_path / "part", "pt") as file:
        changed = {key: file.get_tensor(key) for key in stored}
    changed[name].view(-1).view(torch.uint8)[-1] ^= 4
    writer.write_tensors(tmp_path / "out" / SINGLE, changed)
    with pytest.raises(VerificationError, match=f"^{name} reads back different"):
        writer.check_assembled([part], tmp_path / "out")


@pytest.mark.parametrize(("left", "match"), [(("a",), "^b was written"), (("a", "b", "c"), "^c reads back different")])
def test_a_lost_or_foreign_tensor_is_named(left: tuple[str, ...], match: str, tmp_path: Path) -> None:
    part = writer.write_part(tmp_path / "part", {"a": torch.ones(2), "b": torch.ones(3)})
    (tmp_path / "out").mkdir()
    writer.write_tensors(tmp_path / "out" / SINGLE, {name: torch.ones(2 + (name == "b")) for name in left})
    with pytest.raises(VerificationError, match=match):
        writer.check_assembled([part], tmp_path / "out")


def test_where_files_have_no_second_names_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    part = writer.write_part(tmp_path / "part", {"weight": torch.ones(4)})
    (tmp_path / "out").mkdir()
    writer.assemble([part], tmp_path / "out")
    assert same(load_file(tmp_path / "out" / SINGLE)["weight"], torch.ones(4))


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path: Path) -> None:
    header = {f"key {number}": 'a\u00e9\u2028\x01\x7f"\\\n/' * number for number in range(12)}
    stored = {"b": filled(torch.int8, (3,), 0), "a\u00e9": filled(torch.float32, (2, 5), 1)}
    written = set()
    for number in range(8):
        path = tmp_path / str(number)
        writer.write_tensors(path, stored, header)
        written.add(path.read_bytes())
        with safe_open(path, "pt") as file:
            assert file.metadata() == header
        assert all(same(load_file(path)[name], tensor) for name, tensor in stored.items())
    assert len(written) == 1
