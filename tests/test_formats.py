"""Every layout that is written: what plain transformers makes of it, what reading back gives, and what is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_models
from helpers import WEIGHTS, change, skipped_if_too_old
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.constraints import BlockTable, Constraint, Grid, LowRank, Microscaled, Sparse, SparseGrid, Table
from hesse.errors import CheckpointError, OptionError
from hesse.formats import DenseFormat, StoredLayer, choose_format, open_checkpoint, packed
from hesse.networks.network import CheckpointNetwork

FolderOf = Callable[[str], Path]
Rules = dict[str, Constraint]  # the first pattern found in a layer's name decides
CAUSAL, BASE = "AutoModelForCausalLM", "AutoModel"
ATTENTION, EXPERTS, OTHERS = r"(attn|attention)\.", r"\.experts\.", ""
INT4, INT8 = Grid(bits=4, group_size=32), Grid(bits=8, group_size=32)
UNEVEN = Grid(bits=4, group_size=32, symmetric=False)


@dataclass(frozen=True)
class Case:
    """A tiny model, what becomes of its layers, and the class that loads it."""

    family: str
    rules: Rules
    format: str = "auto"
    dtype: torch.dtype = torch.bfloat16
    changes: dict[str, object] = field(default_factory=dict)
    loader: str = CAUSAL
    strip: str = ""  # what the checkpoint's names lack, as those of older models do


def llama(constraint: Constraint, **options: Any) -> Case:
    return Case("llama", {OTHERS: constraint}, **options)


# Of these widths and 64 or 32 the common divisor is too small. Experts need rows of a multiple of 16 bytes.
NARROW: dict[str, object] = {"intermediate_size": 100}
NARROW_EXPERTS: dict[str, object] = {"intermediate_size": 104}
CASES: dict[str, Case] = {
    **{f"int{b}-group": llama(Grid(bits=b, group_size=32)) for b in (2, 3, 4, 8)},
    **{f"int{b}-channel": llama(Grid(bits=b, group_size=-1)) for b in (2, 3, 4, 8)},
    **{f"int4-{t}": llama(INT4, dtype=getattr(torch, t)) for t in ("float32", "float16")},
    **{f"int{b}-asymmetric": llama(Grid(bits=b, group_size=32, symmetric=False)) for b in (3, 4)},
    "int3-asymmetric-channel": llama(Grid(bits=3, group_size=-1, symmetric=False)),
    **{
        f"int4-{family}": Case(family, {OTHERS: INT4}, loader=BASE if family in tiny_models.ENCODERS else CAUSAL)
        for family in tiny_models.FAMILIES
        if family != "llama"
    },
    "base-class": llama(INT4, loader=BASE),
    "base-class-mixed": Case("llama", {ATTENTION: INT8, OTHERS: INT4}, loader=BASE),
    "masked-head": Case("bert-masked", {OTHERS: INT4}, loader="AutoModelForMaskedLM"),
    "bare-names": Case("gpt2", {OTHERS: INT4}, strip="transformer."),
    "gpt2-channel": Case("gpt2", {OTHERS: Grid(bits=3, group_size=-1)}),
    "gpt2-asymmetric": Case("gpt2", {OTHERS: UNEVEN}),
    "falcon-asymmetric": Case("falcon", {OTHERS: UNEVEN}),
    "ragged-96": llama(Grid(bits=4, group_size=64)),
    "ragged-100": llama(Grid(bits=4, group_size=64), changes=NARROW),
    "ragged-100-int3-channel": llama(Grid(bits=3, group_size=-1), changes=NARROW),
    "ragged-96-asymmetric": llama(Grid(bits=4, group_size=64, symmetric=False)),
    "ragged-100-asymmetric": llama(UNEVEN, changes=NARROW),
    "ragged-experts": Case("mixtral", {OTHERS: Grid(bits=4, group_size=64)}),
    "ragged-100-experts": Case("mixtral", {OTHERS: INT4}, changes=NARROW_EXPERTS),
    "mixed": Case("llama", {ATTENTION: INT8, OTHERS: INT4}),
    "mixed-groups": Case("llama", {"down": Grid(bits=3, group_size=16), "q_proj": Grid(8, -1), OTHERS: INT4}),
    **{
        f"attention-only-{family}": Case(family, {ATTENTION: INT4})
        for family in ("mixtral", "qwen2-moe", "olmoe", "llama")
    },
    **{f"experts-only-{family}": Case(family, {EXPERTS: INT4}) for family in ("mixtral", "qwen2-moe")},
    "experts-int3": Case("qwen2-moe", {EXPERTS: Grid(bits=3, group_size=32), OTHERS: INT8}),
    "symmetric-experts": Case("mixtral", {EXPERTS: INT4, OTHERS: UNEVEN}),
    "dense-experts-asymmetric": Case("mixtral", {ATTENTION: UNEVEN}),
    "sparse-and-int4": llama(SparseGrid(Sparse(2, 4), INT4)),
    "sparse": llama(Sparse(0.5)),
    "sparse-beside-int4": Case("llama", {ATTENTION: INT4, OTHERS: Sparse(2, 4)}),
    "dense-int3": llama(Grid(bits=3, group_size=32), format="dense"),
    "dense-experts": Case("mixtral", {"w1": UNEVEN, EXPERTS: Sparse(0.5)}, format="dense"),
    "dense-gpt2": Case("gpt2", {OTHERS: Sparse(0.5)}),
    **{f"fp8-{family}": Case(family, {OTHERS: Table("fp8", -1)}) for family in ("llama", "llama-tied", "qwen2", "opt")},
    "fp8-float16": llama(Table("fp8", -1), dtype=torch.float16),
    "fp8-block": llama(BlockTable()),
    "fp8-small-blocks": llama(BlockTable("fp8", 40, height=24)),
    "fp8-attention": Case("llama", {ATTENTION: Table("fp8", -1)}),
    **{f"mxfp4-{family}": Case(family, {OTHERS: Microscaled()}) for family in ("llama", "qwen2", "opt")},
    "low-rank": llama(LowRank(rank=8)),
    "low-rank-float32": llama(LowRank(rank=8), dtype=torch.float32),
    "low-rank-base-class": llama(LowRank(rank=8), loader=BASE),
    **{
        f"low-rank-{family}": Case(family, {ATTENTION: LowRank(rank=8)})
        for family in ("gemma3", "mixtral", "qwen2-moe", "opt", "gpt-neox", "phi3", "falcon", "qwen2")
    },
    "low-rank-gpt2": Case("gpt2", {OTHERS: LowRank(rank=8)}),
    "low-rank-bert": Case("bert", {OTHERS: LowRank(rank=8)}, loader=BASE),
    "low-rank-masked": Case("bert-masked", {OTHERS: LowRank(rank=8)}, loader="AutoModelForMaskedLM"),
    "low-rank-masked-base": Case("bert-masked", {OTHERS: LowRank(rank=8)}, loader=BASE),
    **{
        f"low-rank-int4-{family}": Case(family, {ATTENTION: LowRank(rank=8), OTHERS: INT4})
        for family in ("llama", "llama-tied", "mixtral", "qwen2-moe", "falcon", "gpt2")
    },
    "low-rank-int4-bert": Case("bert", {ATTENTION: LowRank(rank=8), OTHERS: INT4}, loader=BASE),
    "low-rank-int4-sparse": Case("llama", {"q_proj": LowRank(rank=8), ATTENTION: INT4, "up": Sparse(2, 4)}),
    "low-rank-dense": llama(LowRank(rank=8), format="dense"),
}

# Loads each OUT and its dense twin and compares them bit for bit. Two thin layers round in between, so that for them
# the twin's layers are replaced by plain linear ones.
PROGRAM = """
import json, os, sys
sys.modules["hesse"] = None  # to import it fails
import torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
ids = torch.randint(5, 500, (2, 16), generator=torch.Generator().manual_seed(0))

def output(model):
    with torch.no_grad():
        result = model.eval()(input_ids=ids)
    return result.logits if "logits" in result else result.last_hidden_state

def factorise(model, name, tensors):
    prefix = model.base_model_prefix + "."
    known = dict(model.named_modules())
    name_here = next(n for n in (name, name.removeprefix(prefix), prefix + name) if n in known)
    thin = []
    for part in ("0", "1"):
        weight, bias = tensors[f"{name}.{part}.weight"], tensors.get(f"{name}.{part}.bias")
        linear = torch.nn.Linear(*weight.T.shape, bias=bias is not None, dtype=weight.dtype)
        linear.weight.data = weight
        if bias is not None:
            linear.bias.data = bias
        thin.append(linear)
    model.set_submodule(name_here, torch.nn.Sequential(*thin))

def check(name, loader):
    loader = getattr(transformers, loader)
    low_rank = json.load(open(f"{name}/out/config.json")).get("low_rank", {})
    found = {}
    if low_rank:
        for key, options in (("asked", {}), ("untrusted", {"trust_remote_code": False})):
            try:
                loader.from_pretrained(f"{name}/out", **options)
                found[key] = ""
            except Exception as error:
                found[key] = type(error).__name__
        named = json.load(open(f"{name}/twin/config.json"))["architectures"][0]
        try:
            output(getattr(transformers, named).from_pretrained(f"{name}/out"))
            found["named"] = ""
        except Exception as error:
            found["named"] = type(error).__name__
    model, info = loader.from_pretrained(
        f"{name}/out", output_loading_info=True, **({"trust_remote_code": True} if low_rank else {})
    )
    twin, twin_info = loader.from_pretrained(f"{name}/twin", output_loading_info=True)
    if low_rank:
        tensors = load_file(f"{name}/out/model.safetensors")
        for layer in low_rank:
            factorise(twin, layer, tensors)
    found["equal"] = torch.equal(output(model), output(twin))
    found["dtype"] = str(model.dtype)
    for key, value in info.items():  # the base class of a model with a head finds tensors of the head, in both alike
        found[key] = sorted(map(str, value)) if sorted(map(str, value)) != sorted(map(str, twin_info[key])) else []
    head = model.get_output_embeddings()
    found["tied"] = head is not None and head.weight is model.get_input_embeddings().weight
    return found

# Every folder's model file is the same one: what loading one registers would serve the next.
registries = [
    getattr(transformers, auto)._model_mapping._extra_content
    for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")
]
registries.append(transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content)
results = {}
for name, loader in json.load(open("cases.json")).items():
    try:
        results[name] = check(name, loader)
    except Exception as error:
        results[name] = {"error": f"{type(error).__name__}: {error}"}
    for registry in registries:
        registry.clear()
json.dump(results, open("results.json", "w"))
"""


@dataclass(frozen=True)
class Written:
    """A folder that a format wrote."""

    format: DenseFormat
    out: Path
    dense: dict[str, Tensor]  # every tensor that it stands for, as decoded
    sizes: dict[str, int]  # bytes of each solved layer's weight in `out`
    bits: dict[str, float]  # of each solved layer's weight, as the format says


def planned(source: Path, rules: Rules, requested: str = "auto") -> DenseFormat:
    """The format that is chosen for a model under `rules`."""
    network = CheckpointNetwork(Checkpoint(source), torch.float32, torch.device("cpu"))
    layers = [
        StoredLayer(
            layer.name,
            layer.weight.shape,
            next((rules[pattern] for pattern in rules if re.search(pattern, layer.name)), None),
            layer.transposed,
        )
        for layer in network.layers
    ]
    return choose_format(requested, network, layers)


def write(source: Path, rules: Rules, requested: str, folder: Path) -> Written:
    """Round each layer to nearest, and write `out` and a dense `twin` of it into `folder`."""
    form = planned(source, rules, requested)
    checkpoint = form.network.checkpoint
    tensors = checkpoint.read(checkpoint.names())
    dense, sizes, bits = dict(tensors), {}, {}
    for name, layer in form.layers.items():
        constraint = form.constraint(name)
        if constraint is None:
            continue
        stored, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        encoded = constraint.encode((stored.T if layer.transposed else stored).float())
        weight = form.as_stored(name, encoded, constraint.decode(encoded))
        own = form.tensors(name, encoded, weight, bias)
        assert all(tensor.is_contiguous() for tensor in own.values())
        assert not own.keys() & tensors.keys()
        described = {key: (tensor.shape, tensor.dtype) for key, tensor in form.stored(name).items()}
        assert described == {k: (t.shape, t.dtype) for k, t in own.items() if not k.endswith("bias")}
        tensors.update(own)
        dense[f"{name}.weight"] = (weight.T if layer.transposed else weight).contiguous()
        sizes[name] = sum(tensor.nbytes for key, tensor in own.items() if not key.endswith("bias"))
        bits[name] = form.stored_bits(name)
    for path, config, content in (
        (folder / "out", form.config(), tensors),
        (folder / "twin", checkpoint.config, {n: t.to(checkpoint.dtype(n)) for n, t in dense.items()}),
    ):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(content, path / WEIGHTS, metadata={"format": "pt"})
    for file, text in form.files().items():
        (folder / "out" / file).write_text(text, encoding="utf-8")
    return Written(form, folder / "out", dense, sizes, bits)


def strip(folder: Path, prefix: str) -> None:
    """Take a prefix from the names of a checkpoint's tensors."""
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


class Folders(dict[str, Written]):
    """The cases by name, each written when it is first asked for, so that one that fails leaves the others be."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def __missing__(self, name: str) -> Written:
        case = CASES[name]
        source = self.place / f"source-{case.family}-{case.dtype}-{len(case.changes)}-{case.strip}"
        if not source.exists():
            tiny_models.save(case.family, source, case.dtype, **case.changes)
            strip(source, case.strip)
        with skipped_if_too_old():
            self[name] = write(source, case.rules, case.format, self.place / name)
        return self[name]


@pytest.fixture(scope="module")
def written(place: Path) -> Folders:
    return Folders(place)


@pytest.fixture(scope="module")
def loaded(place: Path, written: Folders) -> dict[str, dict[str, Any]]:
    """What one plain process found about all cases that could be written."""
    for name in CASES:
        with suppress(OptionError, pytest.skip.Exception):
            written[name]
    (place / "cases.json").write_text(json.dumps({name: CASES[name].loader for name in written}))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=place,
        env={**environment, "HF_MODULES_CACHE": str(place / "modules")},
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=600,
    )
    found: dict[str, dict[str, Any]] = json.loads((place / "results.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_the_dense_twin_computes(
    name: str, written: Folders, loaded: dict[str, dict[str, Any]]
) -> None:
    assert written[name].out.exists()
    found = loaded[name]
    assert found.get("error") is None
    assert found["equal"]
    assert found["dtype"] == str(CASES[name].dtype)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert found[kind] == [], kind


@pytest.mark.parametrize("name", CASES)
def test_reading_back_gives_the_decoded_weights(name: str, written: Folders) -> None:
    case = written[name]
    checkpoint = open_checkpoint(case.out)
    assert sorted(checkpoint.names()) == sorted(case.dense)
    for tensor, value in checkpoint.read(case.dense).items():
        assert value.shape == case.dense[tensor].shape
        assert torch.equal(value.to(case.dense[tensor].dtype), case.dense[tensor]), tensor
    again = CheckpointNetwork(checkpoint, torch.float32, torch.device("cpu"))
    source = case.format.network
    assert type(again.model) is type(source.model)
    assert [layer.name for layer in again.layers] == [layer.name for layer in source.layers]


@pytest.mark.parametrize("name", CASES)
def test_stored_bits_are_those_on_disk(name: str, written: Folders) -> None:
    case = written[name]
    for layer, bits in case.bits.items():
        assert bits == pytest.approx(8 * case.sizes[layer] / case.format.layers[layer].shape.numel())


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if n.startswith("low-rank") and case.format == "auto"])
@pytest.mark.slow
def test_low_rank_fails_loudly_where_its_code_is_not_trusted(
    name: str, written: Folders, loaded: dict[str, dict[str, Any]]
) -> None:
    assert written[name].out.exists()
    found = loaded[name]
    assert all(found[way] for way in ("asked", "untrusted", "named"))


@pytest.mark.parametrize(
    "name", ["int4-llama-tied", "low-rank-int4-llama-tied", "int4-gpt2", "bare-names", "int4-opt", "int4-gemma3"]
)
@pytest.mark.slow
def test_tied_embeddings_stay_tied(name: str, written: Folders, loaded: dict[str, dict[str, Any]]) -> None:
    assert written[name].out.exists()
    assert loaded[name]["tied"]
    assert not loaded["int4-group"]["tied"]


def test_auto_takes_the_smallest_that_loads(written: Folders) -> None:
    expected = {
        "int4-group": "pack-quantized",
        "sparse-and-int4": "pack-quantized",
        "sparse-beside-int4": "pack-quantized",
        "sparse": "dense",
        "low-rank": "low-rank",
        "low-rank-int4-llama": "low-rank",
    }
    assert {name: written[name].format.name for name in expected} == expected


def test_dense_holds_the_values_that_packed_codes_stand_for(written: Folders) -> None:
    dense, codes = written["dense-int3"], written["int3-group"]
    assert all(torch.equal(codes.dense[name], dense.dense[name]) for name in codes.dense)


def test_scales_have_the_type_of_the_checkpoint(written: Folders) -> None:
    for name, dtype in (("int4-float32", torch.float32), ("int4-float16", torch.float16), ("int4-group", None)):
        scales = [t for n, t in load_file(written[name].out / WEIGHTS).items() if n.endswith("weight_scale")]
        assert {scale.dtype for scale in scales} == {dtype or torch.bfloat16}


def config_of(case: Written) -> dict[str, Any]:
    config: dict[str, Any] = case.format.config()["quantization_config"]
    return config


def test_the_plain_case_is_what_every_loader_knows(written: Folders) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    assert config_of(written["int4-group"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    own = load_file(written["int4-group"].out / WEIGHTS)
    layer = "model.layers.0.mlp.down_proj"
    assert own[f"{layer}.weight_packed"].dtype == torch.int32
    assert own[f"{layer}.weight_packed"].shape == (64, 12)
    assert own[f"{layer}.weight_scale"].shape == (64, 3)
    assert own[f"{layer}.weight_shape"].tolist() == [64, 96]


def test_experts_are_ignored_in_one_pattern(written: Folders) -> None:
    """One for each of thousands of experts would be looked up for each of thousands of modules."""
    ignored = config_of(written["attention-only-qwen2-moe"])["ignore"]
    assert len([pattern for pattern in ignored if re.search(r"experts\b", pattern)]) == 1
    assert len(ignored) <= 10


def test_groups_that_do_not_divide_a_width(written: Folders) -> None:
    for name, group, groups in (("ragged-96", 32, 3), ("ragged-100", 64, 2)):
        case = written[name]
        layers = [n for n in case.format.layers if "down_proj" in n]
        constraint = case.format.constraint(layers[0])
        assert isinstance(constraint, Grid)
        assert constraint.group_size == group
        scale = load_file(case.out / WEIGHTS)[f"{layers[0]}.weight_scale"]
        assert scale.shape == (64, groups)
        assert len(case.format.notes) == 1
        width = case.format.layers[layers[0]].shape[1]
        for part in ("2 layers", layers[0], f"width {width}", f"64 does not divide {width}"):
            assert part in case.format.notes[0]
    assert "groups of 32" in written["ragged-96"].format.notes[0]
    assert "narrower" in written["ragged-100"].format.notes[0]
    assert written["int4-group"].format.notes == []


@pytest.mark.parametrize(("name", "pattern"), [("ragged-experts", EXPERTS), ("ragged-96-asymmetric", OTHERS)])
def test_layers_that_must_share_a_scheme_share_a_group_size(name: str, pattern: str, written: Folders) -> None:
    form = written[name].format
    sizes = set()
    for layer in (layer for layer in form.layers.values() if re.search(pattern, layer.name)):
        assert isinstance(layer.constraint, Grid)
        sizes.add((layer.shape[1], layer.constraint.group_size))
    assert sizes == {(64, 32), (96, 32)}


MIXED_EXPERTS: Rules = {"layers.0.*experts": INT4, EXPERTS: INT8}


@pytest.mark.parametrize(
    ("family", "rules", "requested", "message"),
    [
        ("llama", {OTHERS: INT4}, "gguf", "no format 'gguf'; there are auto, pack-quantized, int-quantized, .*dense"),
        ("llama", {OTHERS: LowRank(rank=8)}, "pack-quantized", r"layers\.0\.self_attn\.q_proj.*LowRank.*--format"),
        ("llama", {OTHERS: Sparse(0.5)}, "pack-quantized", r"q_proj: .*not Sparse; use --format auto"),
        ("llama", {OTHERS: INT4}, "low-rank", "no layer is factorised.*--format auto"),
        ("mixtral", {OTHERS: UNEVEN}, "auto", r"experts\.0\.w1: .*asymmetric experts.*--symmetric"),
        ("mixtral", MIXED_EXPERTS, "auto", r"experts\.0\.w1: .*share one scheme.*one rule.*--format dense"),
        ("olmoe", {"gate_proj": INT4, "up_proj": INT4, "down_proj": INT8}, "auto", "share one scheme"),
        ("mixtral", {"layers.0.*experts": INT4}, "auto", r"experts\.0\.w1: .*share one scheme"),
        ("mixtral", {EXPERTS: LowRank(rank=8)}, "auto", r"experts\.0\.w1: .*--ignore.*--format dense"),
        ("gpt2", {ATTENTION: INT8, OTHERS: INT4}, "auto", r"h\.0\.attn\.c_attn: .*share one scheme.*--format dense"),
        ("llama", {ATTENTION: INT8, OTHERS: UNEVEN}, "auto", "share one scheme.*one rule.*--symmetric"),
    ],
)
def test_what_no_loader_takes_is_refused_at_once(
    family: str, rules: Rules, requested: str, message: str, half_folder: FolderOf
) -> None:
    with pytest.raises(OptionError, match=message), skipped_if_too_old():
        planned(half_folder(family), rules, requested)


def test_a_transformers_that_would_read_wrong_weights_is_refused(
    half_folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "LOADER_UNPACKS", False)
    planned(half_folder("llama"), {OTHERS: INT4})
    for family, constraint in (("llama", UNEVEN), ("gpt2", INT4)):
        with pytest.raises(OptionError, match=r"transformers 5\.23.*update it, or use --format dense"):
            planned(half_folder(family), {OTHERS: constraint})


# What other programs write. Keys that mean nothing here are there because they write them.
PEER_KEYS: dict[str, object] = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "global_compression_ratio": None,
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.19.0",
    "ignore": ["lm_head"],
}
Local = dict[str, Tensor]  # the tensors of one layer


def on_grid(grid: Grid) -> Callable[[Tensor], tuple[Local, Tensor]]:
    """A weight before it is compressed, its scales and zero points; and the values that are meant."""

    def prepared(weight: Tensor) -> tuple[Local, Tensor]:
        constraint = grid.stored_as(weight.dtype)
        encoded = constraint.encode(weight.float())
        exact = constraint.stored_as(torch.float32).decode(encoded)
        local = {"weight": exact, "weight_scale": encoded.scales.scale.to(weight.dtype)}
        if encoded.scales.zero_point is not None:
            local["weight_zero_point"] = encoded.scales.zero_point.to(torch.int8)
        return local, constraint.decode(encoded).to(weight.dtype)

    return prepared


def in_float8(rows: int, columns: int) -> Callable[[Tensor], tuple[Local, Tensor]]:
    """The same with a scale for each block of `rows` x `columns`; 0 columns for a whole row."""

    def prepared(weight: Tensor) -> tuple[Local, Tensor]:
        width = columns or weight.shape[1]
        blocks = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // width, width)
        scale = (blocks.abs().amax((1, 3)) / 448).to(weight.dtype)
        per_weight = scale.repeat_interleave(rows, 0).repeat_interleave(width, 1)
        codes = (weight / per_weight).to(torch.float8_e4m3fn)
        return {"weight": codes.to(weight.dtype) * per_weight, "weight_scale": scale}, codes.to(
            weight.dtype
        ) * per_weight

    return prepared


SIGNED = {"num_bits": 4, "symmetric": True}
GROUP = {"type": "int", "strategy": "group", "group_size": 32, "observer": "minmax", "dynamic": False}
CHANNEL = {"type": "int", "strategy": "channel", "observer": "mse"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
PEERS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], tuple[Local, Tensor]]]] = {
    "group": ("pack-quantized", {**GROUP, **SIGNED}, on_grid(INT4)),
    "static-order": (
        "pack-quantized",
        {**GROUP, **SIGNED, "actorder": "static"},
        on_grid(INT4),
    ),
    "asymmetric": ("pack-quantized", {**GROUP, "num_bits": 4, "symmetric": False}, on_grid(UNEVEN)),
    "asymmetric-channel": (
        "pack-quantized",
        {**CHANNEL, "num_bits": 3, "symmetric": False},
        on_grid(Grid(bits=3, group_size=-1, symmetric=False)),
    ),
    "int8": ("int-quantized", {**CHANNEL, "num_bits": 8, "symmetric": True}, on_grid(Grid(bits=8, group_size=-1))),
    "float8": ("float-quantized", FLOAT8, in_float8(1, 0)),
    "float8-block": (
        "float-quantized",
        {**FLOAT8, "strategy": "block", "block_structure": [16, 32]},
        in_float8(16, 32),
    ),
}


def quantised(source: Path, folder: Path, **quantization: object) -> Path:
    """A copy of `source` whose config has these keys in its `quantization_config`."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {**PEER_KEYS, **quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", PEERS)
def test_what_compressed_tensors_itself_stores_is_read(name: str, half_folder: FolderOf, tmp_path: Path) -> None:
    form, arguments, prepare = PEERS[name]
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None, "output_activations": None}
    scheme = QuantizationScheme.model_validate(group)
    compressor = BaseCompressor.get_value_from_registry(form)
    folder = quantised(half_folder("llama"), tmp_path / "peer", format=form, config_groups={"group_0": group})
    expected = load_file(folder / WEIGHTS)

    def compress_layers(tensors: dict[str, Tensor]) -> None:
        for tensor in [key for key in tensors if key.endswith("_proj.weight")]:
            local, expected[tensor] = prepare(tensors.pop(tensor))
            stored = compressor.compress(local, scheme)
            tensors.update({f"{tensor.removesuffix('weight')}{part}": stored[part].contiguous() for part in stored})

    change(folder, compress_layers)
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.names()) == sorted(expected)
    for tensor, value in checkpoint.read(expected).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[tensor]), tensor


def test_the_most_exact_target_decides(half_folder: FolderOf, tmp_path: Path) -> None:
    """As in compressed-tensors: a layer's name before a pattern, a pattern before a class, whatever their order."""
    written = write(half_folder("llama"), {"v_proj": INT8, "q_proj": Grid(3, 32), ATTENTION: INT4}, "auto", tmp_path)
    config = json.loads((written.out / "config.json").read_text())
    by_bits = {g["weights"]["num_bits"]: g for g in config["quantization_config"]["config_groups"].values()}
    by_bits[4]["targets"] = ["Linear"]
    by_bits[8]["targets"] = [r"re:.*self_attn\.(q|v)_proj$"]
    by_bits[3]["targets"] = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    config["quantization_config"]["config_groups"] = {str(bits): by_bits[bits] for bits in (4, 8, 3)}
    (written.out / "config.json").write_text(json.dumps(config))
    for tensor, value in open_checkpoint(written.out).read(written.dense).items():
        assert torch.equal(value.to(written.dense[tensor].dtype), written.dense[tensor]), tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method gptq, which Hesse does not read: start from the dense model"),
        ({"quant_method": None}, "quant_method None"),
        ({"config_groups": None}, "config_groups"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"no_such_key": 1}}}}, "no_such_key"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}}, "transform_config"),
        ({"format": "marlin-24"}, "marlin-24"),
    ],
)
def test_what_cannot_be_read_is_named(
    changes: dict[str, object], message: str, half_folder: FolderOf, tmp_path: Path
) -> None:
    groups = {"group_0": {"targets": ["Linear"], "weights": {**GROUP, **SIGNED}}}
    quantization = {"format": "pack-quantized", "config_groups": groups, **changes}
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(quantised(half_folder("llama"), tmp_path / "peer", **quantization))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda own: own.pop("weight_packed"), "cannot be decoded"),
        (lambda own: own.pop("weight_scale"), "cannot be decoded"),
        (lambda own: own.pop("weight_shape"), "cannot be decoded"),
        (
            lambda own: own.update(weight_packed=own["weight_packed"][:, :3].contiguous()),
            "3 words, but 4 bits need 8",
        ),
        (lambda own: own.update(weight_packed=own["weight_packed"].repeat(1, 2)), "16 words, but 4 bits need 8"),
        (lambda own: own.update(weight_g_idx=torch.zeros(64, dtype=torch.int32)), "reordered columns"),
    ],
)
def test_a_layer_that_cannot_be_decoded_is_named(
    edit: Callable[[Local], object], message: str, half_folder: FolderOf, tmp_path: Path
) -> None:
    written = write(half_folder("llama"), {OTHERS: INT4}, "auto", tmp_path)
    layer = "model.layers.1.mlp.up_proj"

    def damage(tensors: dict[str, Tensor]) -> None:
        own = {n.rpartition(".")[2]: tensors.pop(n) for n in list(tensors) if n.startswith(f"{layer}.")}
        edit(own)
        tensors.update({f"{layer}.{part}": tensor for part, tensor in own.items()})

    change(written.out, damage)
    with pytest.raises(CheckpointError, match=re.escape(layer)) as raised:
        open_checkpoint(written.out).read([f"{layer}.weight"])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_layer_without_a_scheme_is_named(half_folder: FolderOf, tmp_path: Path) -> None:
    written = write(half_folder("llama"), {ATTENTION: INT8, OTHERS: INT4}, "auto", tmp_path)
    config = json.loads((written.out / "config.json").read_text())
    config["quantization_config"]["config_groups"].pop("group_0")
    (written.out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no scheme for model\.layers\.0\.self_attn\.q_proj"):
        open_checkpoint(written.out).read(["model.layers.0.self_attn.q_proj.weight"])
