"""Checkpoints that anybody may have written: each is read, or refused by name, in little time."""

import json
import struct
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import JSON, LIMITED, folder, survives
from hesse.checkpoints.checkpoint import INDEX, Checkpoint
from hesse.errors import CheckpointError, HesseError
from hesse.estimation import Statistics
from hesse.formats import open_checkpoint
from hesse.networks.network import CheckpointNetwork


def entry(name: str, shape: list[Any], stop: int) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}}


def read_checkpoint(files: dict[str, bytes]) -> None:
    with folder() as place:
        for name, content in files.items():
            (place / name).write_bytes(content)

        def read() -> None:
            checkpoint = open_checkpoint(place)
            checkpoint.read(checkpoint.names())
            assert checkpoint.stored_bytes <= checkpoint.file_bytes

        survives(read, CheckpointError)


def safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = safetensors(entry("a.weight", [2, 2], 16), bytes(16))


@LIMITED
@given(JSON)
@example({"weight_map": {"a.weight": "../model.safetensors"}})
@example({"weight_map": {"a.weight": {"b": 1}}})
@example({"weight_map": {"a.weight": ["model.safetensors"]}})
@example({"weight_map": {"a.weight": "\0"}})
@example({"weight_map": {"a.weight": "\ud800"}})
@example({"weight_map": {"\ud800": "model.safetensors"}})
@example({"weight_map": {"a.weight": "config.json"}})
@example({"weight_map": {"a.weight": "a" * 5000}})
@example({"weight_map": ["a.weight"]})
def test_an_index_of_anything(content: Any) -> None:
    index = content if isinstance(content, dict) and "weight_map" in content else {"weight_map": content}
    files = {"config.json": b"{}", "model.safetensors": ONE}
    read_checkpoint({**files, INDEX: json.dumps(index).encode()})


@LIMITED
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=3), st.binary(max_size=16))
@example({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, b"")
@example({"a": {"dtype": "F32", "shape": [2**32, 2**32, 0], "data_offsets": [0, 0]}}, b"")
@example({"": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4))
@example({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\x07")
def test_a_header_of_anything(header: Any, data: bytes) -> None:
    read_checkpoint({"config.json": b"{}", "model.safetensors": safetensors(header, data)})


@LIMITED
@given(st.integers(0, len(ONE) - 1), st.integers(0, 255))
def test_one_byte_that_is_wrong(place: int, byte: int) -> None:
    damaged = ONE[:place] + bytes([byte]) + ONE[place + 1 :]
    read_checkpoint({"config.json": b"{}", "model.safetensors": damaged})


SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 2}
GROUP = {"targets": ["Linear"], "weights": SCHEME}
METHOD = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@LIMITED
@given(st.sampled_from(["config_groups", "targets", "weights", *SCHEME, "format", "ignore", "transform_config"]), JSON)
@example("config_groups", {"group_0": ["Linear"]})
@example("config_groups", {"W8A8": 3})
@example("weights", None)
@example("targets", ["re:("])
@example("targets", ["re:(a|aa)+$", ""])
@example("num_bits", 0)
@example("num_bits", 2**70)
@example("group_size", "2")
@example("format", ["dense"])
def test_a_quantization_config_of_anything(key: str, value: Any) -> None:
    scheme = {**SCHEME, key: value} if key in SCHEME else value if key == "weights" else SCHEME
    group = {**GROUP, "weights": scheme, **({"targets": value} if key == "targets" else {})}
    config: dict[str, Any] = {**METHOD, "config_groups": {"group_0": group}}
    if key in ("config_groups", "format", "ignore", "transform_config"):
        config[key] = value
    header = {
        "a.weight_packed": {"dtype": "I32", "shape": [2, 1], "data_offsets": [0, 8]},
        "a.weight_scale": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8, 16]},
        "a.weight_shape": {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]},
    }
    data = bytes(8) + struct.pack("<2f2q", 1, 1, 2, 2)
    files = {"config.json": json.dumps({"quantization_config": config}).encode()}
    read_checkpoint({**files, "model.safetensors": safetensors(header, data)})


@LIMITED
@given(st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode())))
@example(b'{"model_type": "low_rank_llama", "low_rank": {"a": 1}, "architectures": [1]}')
@example(b'{"quantization_config": "x"}')
def test_a_config_of_anything(text: bytes) -> None:
    read_checkpoint({"config.json": text, "model.safetensors": ONE})


SETTINGS = ("num_hidden_layers", "hidden_size", "head_dim", "vocab_size", "num_attention_heads", "num_key_value_heads")
OTHERS = (
    "architectures",
    "hidden_act",
    "rope_parameters",
    "max_position_embeddings",
    "pad_token_id",
    "dtype",
    "id2label",
)
SMALL = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1),
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}


@LIMITED
@given(st.sampled_from([*SETTINGS, *OTHERS, "get_text_config", "_name_or_path", "tie_word_embeddings"]), JSON)
@example("num_hidden_layers", 9000)
@example("head_dim", 10**11)
@example("hidden_size", -8)
@example("num_attention_heads", 0)
@example("dtype", "__class__")
@example("get_text_config", "no method")
@example("rope_parameters", {"rope_type": "yarn"})
@example("id2label", {"0": 1, "x": 2})
@example("tie_word_embeddings", [])
def test_a_setting_of_anything(key: str, value: Any) -> None:
    """Modules are made of it, or Hesse says that they cannot be."""
    with folder() as place:
        (place / "config.json").write_text(json.dumps({**SMALL, key: value}))
        (place / "model.safetensors").write_bytes(ONE)

        def read() -> None:
            assert (CheckpointNetwork(open_checkpoint(place), torch.float32, torch.device("cpu")).input_limit or 0) >= 0

        survives(read, HesseError)


@LIMITED
@given(JSON)
def test_statistics_of_anything(content: Any) -> None:
    with folder() as place:
        (place / "statistics.json").write_text(json.dumps(content))
        survives(lambda: Statistics(place), CheckpointError)


def test_a_good_checkpoint_is_read() -> None:
    with folder() as place:
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_bytes(ONE)
        assert Checkpoint(place).read(["a.weight"])["a.weight"].shape == (2, 2)
