"""A low rank beside any compressed checkpoint: against its definition, as other programs add it, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hesse
import tiny_models
from helpers import IDS, OTHER_IDS, CommandLine, change, compress, dense_tensors, left_over, output, twin, write_ids
from hesse.errors import CheckpointError, HesseError, OptionError
from hesse.formats import open_checkpoint
from hesse.formats.adapter import CONFIG, PREFIX, WEIGHTS, AdaptedCheckpoint
from hesse.jobs.repair_report import RepairReport

FolderOf = Callable[[str], Path]
RANK = 6


@pytest.fixture(scope="module")
def compressed(family_folder: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family, or a way to compress a llama, to the folder of what came of it."""
    ways: dict[str, dict[str, Any]] = {
        "packed": {"method": "gptq", "bits": 3, "group_size": 32},
        "pruned": {"method": "magnitude", "sparsity": 0.5},
        "thin": {"method": "svd", "rank": 16},
    }
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "compressed"
            family = "llama" if name in ways else name
            compress(family_folder(family), made[name], **ways.get(name, ways["packed"]))
        return made[name]

    return folder


def repair(dense: Path, compressed: Path, out: Path, **options: Any) -> RepairReport:
    return hesse.repair(dense, compressed, out, **{"data": IDS, "rank": RANK, **options}).report


def products(adapter: Path) -> dict[str, Tensor]:
    """B A (out, in) by the name of its module."""
    tensors = load_file(adapter / WEIGHTS)
    names = [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    return {n: tensors[f"{PREFIX}{n}.lora_B.weight"] @ tensors[f"{PREFIX}{n}.lora_A.weight"] for n in names}


def with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    """What PEFT does: beside each module y = W x it adds B A x (its factors are not trained here)."""
    for name, product in products(adapter).items():
        assert isinstance(model.get_submodule(name), nn.Linear | Conv1D)

        def add(module: nn.Module, inputs: tuple[Tensor], result: Tensor, product: Tensor = product) -> Tensor:
            return result + inputs[0] @ product.T

        model.get_submodule(name).register_forward_hook(add)
    return model


def inputs_of(model: nn.Module, name: str) -> Tensor:
    """What reaches a module on the calibration tokens (tokens, in)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    output(model, IDS)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


def plain_eora(error: Tensor, inputs: Tensor, damping: float) -> Tensor:
    """EoRA as it is stated: X'X = Q L Q', the best rank of E Q L^½, and L^-½ Q' behind it."""
    moment = inputs.T @ inputs / len(inputs)
    moment += damping * moment.diagonal().mean() * torch.eye(len(moment)).double()
    values, vectors = torch.linalg.eigh(moment)
    left, singular, right = torch.linalg.svd(error @ vectors * values.sqrt())
    return (left[:, :RANK] * singular[:RANK]) @ right[:RANK] / values.sqrt() @ vectors.T


@pytest.mark.parametrize("way", ["packed", "pruned", "thin"])
def test_each_product_is_eoras_on_the_inputs_of_the_repaired_model(
    way: str, compressed: FolderOf, family_folder: FolderOf, tmp_path: Path
) -> None:
    source, base = family_folder("llama"), compressed(way)
    report = repair(source, base, tmp_path / "adapter")
    dense, held = dense_tensors(source), dense_tensors(base)
    model = with_adapter(tiny_models.load("llama", twin(base, tmp_path / "twin", source)), tmp_path / "adapter")
    found = products(tmp_path / "adapter")
    assert len(found) == 14
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"):
        error = (dense[f"{name}.weight"] - held[f"{name}.weight"]).double()
        inputs = inputs_of(model, name)
        expected = plain_eora(error, inputs, 0.01)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=2e-5)
        layer = next(layer for layer in report.layers if layer.name == name)
        outputs = (inputs @ dense[f"{name}.weight"].double().T).square().sum()
        left = (inputs @ (error - expected).T).square().sum() / outputs
        assert layer.output_error_after == pytest.approx(float(left), rel=1e-2)
        assert layer.output_error_after < layer.output_error_before
    assert report.loss.measured < report.loss_before.measured
    assert report.loss.predicted < report.loss_before.predicted


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert"])
def test_the_adapter_beside_the_compressed_model_is_the_dense_result(
    family: str, compressed: FolderOf, family_folder: FolderOf, tmp_path: Path
) -> None:
    source, base = family_folder(family), compressed(family)
    report = repair(source, base, tmp_path / "adapter")
    merged = repair(source, base, tmp_path / "dense", format="dense")
    beside = with_adapter(tiny_models.load(family, twin(base, tmp_path / "twin", source)), tmp_path / "adapter")
    ordinary = tiny_models.load(family, tmp_path / "dense")
    torch.testing.assert_close(output(beside), output(ordinary), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(output(ordinary), output(tiny_models.load(family, tmp_path / "twin")), atol=1e-2)
    assert merged.loss.measured == pytest.approx(report.loss.measured, rel=1e-3)
    found = hesse.evaluate(base, merge_adapter=tmp_path / "adapter", reference=source, data=OTHER_IDS).report
    again = hesse.evaluate(tmp_path / "dense", reference=source, data=OTHER_IDS).report
    distances = [x.hidden_error if x.kl is None else x.kl for x in (found, again)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)
    weights = (tmp_path / "adapter" / WEIGHTS).stat().st_size
    assert found.bytes == report.bytes_before + report.bytes_added == open_checkpoint(base).file_bytes + weights
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, RANK, "LORA")
    assert config["fan_in_fan_out"] == (family == "gpt2")
    assert config["task_type"] == (None if family == "bert" else "CAUSAL_LM")


def test_nearly_a_full_rank_gives_the_model_back(compressed: FolderOf, family_folder: FolderOf, tmp_path: Path) -> None:
    source = family_folder("opt")
    report = repair(source, compressed("opt"), tmp_path / "out", rank=63, format="dense")
    assert report.loss_before.measured > 1e-3
    assert report.loss.measured < 1e-5
    held = dense_tensors(tmp_path / "out")
    for name, tensor in dense_tensors(source).items():
        torch.testing.assert_close(held[name], tensor, rtol=1e-2, atol=1e-2)


def test_identity_is_the_plain_svd_of_the_error_and_kronecker_lowers_the_end_loss(
    compressed: FolderOf, family_folder: FolderOf, tmp_path: Path
) -> None:
    source, base = family_folder("llama"), compressed("packed")
    found = {kind: repair(source, base, tmp_path / kind, curvature=kind) for kind in ("identity", "gram", "kronecker")}
    name = "model.layers.1.mlp.gate_proj"
    error = dense_tensors(source)[f"{name}.weight"] - dense_tensors(base)[f"{name}.weight"]
    left, values, right = torch.linalg.svd(error)
    plain = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    torch.testing.assert_close(products(tmp_path / "identity")[name], plain, rtol=1e-3, atol=1e-5)
    assert found["kronecker"].loss.predicted < found["gram"].loss.predicted < found["identity"].loss.predicted


def test_layers_that_are_ignored_or_lack_nothing_stay_as_they_are(family_folder: FolderOf, tmp_path: Path) -> None:
    source = family_folder("llama")
    compress(source, tmp_path / "base", method="gptq", bits=3, group_size=32, ignore=("*.layers.0.*",))
    report = repair(source, tmp_path / "base", tmp_path / "out", ignore=("down_proj",))
    names = {layer.name for layer in report.layers}
    assert names == set(products(tmp_path / "out"))
    assert all(".layers.1." in name and "down_proj" not in name for name in names)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert set(config["target_modules"]) == names  # in full: their last names would meet block 0's too
    with pytest.raises(OptionError, match="lacks nothing of"):
        repair(source, tmp_path / "base", tmp_path / "again", ignore=("*.layers.1.*",))


def test_experts_are_repaired_in_a_dense_result_and_refused_in_an_adapter(
    family_folder: FolderOf, tmp_path: Path
) -> None:
    source = family_folder("mixtral")
    compress(source, tmp_path / "base", method="rtn", bits=3, group_size=32)
    with pytest.raises(OptionError, match=r"experts.*--ignore '\*.experts.\*', or use --format dense"):
        repair(source, tmp_path / "base", tmp_path / "out")
    report = repair(source, tmp_path / "base", tmp_path / "out", format="dense")
    assert any(".experts." in layer.name for layer in report.layers)
    assert report.loss.measured < report.loss_before.measured
    model = tiny_models.load("mixtral", tmp_path / "out")
    dense = output(tiny_models.load("mixtral", source))
    before = output(tiny_models.load("mixtral", twin(tmp_path / "base", tmp_path / "twin", source)))
    assert (output(model) - dense).norm() < (before - dense).norm()
    repair(source, tmp_path / "base", tmp_path / "some", ignore=("*.experts.*",))
    assert not any("experts" in name for name in products(tmp_path / "some"))


def test_weights_in_bfloat16_are_read_back_as_they_were_solved(half_folder: FolderOf, tmp_path: Path) -> None:
    source = half_folder("llama")
    compress(source, tmp_path / "base", method="gptq", bits=3, group_size=32)
    for format in ("adapter", "dense"):
        report = repair(source, tmp_path / "base", tmp_path / format, format=format)
        assert report.loss.measured < report.loss_before.measured
    assert {x.dtype for x in load_file(tmp_path / "adapter" / WEIGHTS).values()} == {torch.bfloat16}
    assert {x.dtype for x in dense_tensors(tmp_path / "dense").values()} == {torch.bfloat16}


# What is refused, before any work


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"num_hidden_layers": 3}, {}, "different vocabularies or numbers of layers"),
        ({"vocab_size": 600}, {}, "different vocabularies or numbers of layers"),
        ({"intermediate_size": 128}, {}, "gate_proj has shape"),
        ({}, {"rank": 0}, "rank is 0"),
        ({}, {"rank": 33}, "k_proj: rank 33 is not below the smaller side of a weight 32 x 64"),
        ({}, {"curvature": "hessian"}, "--curvature is 'hessian': use gram, kronecker, identity"),
        ({}, {"format": "gguf"}, "--format is 'gguf': use adapter, dense"),
        ({}, {"damping": -1.0}, "--damping is -1.0"),
        ({}, {"ignore": ("nothing",)}, "the pattern 'nothing' matches no layer"),
        ({}, {"ignore": ("*",)}, "no layer is left to repair"),
    ],
)
def test_what_cannot_be_repaired_is_refused_by_name(
    changes: dict[str, Any], options: dict[str, Any], said: str, family_folder: FolderOf, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    base = tiny_models.save("llama", tmp_path / "base", **changes)
    with pytest.raises(OptionError, match=said):
        repair(family_folder("llama"), base, tmp_path / "out", **options)
    assert left_over(tmp_path) == []


def test_models_that_are_no_pair_are_refused(compressed: FolderOf, family_folder: FolderOf, tmp_path: Path) -> None:
    source, base = family_folder("llama"), compressed("packed")
    with pytest.raises(OptionError, match=r"is a LlamaForCausalLM and .* a Qwen2ForCausalLM"):
        repair(source, family_folder("qwen2"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="is already compressed: start from the dense model"):
        repair(base, source, tmp_path / "out")
    with pytest.raises(OptionError, match="is both the dense and the compressed model"):
        repair(source, source, tmp_path / "out")

    def move_scales(tensors: dict[str, Tensor]) -> None:
        """The same model: a norm's weights times 4, and the layers behind it by a fourth."""
        tensors["model.layers.1.input_layernorm.weight"] *= -0.2
        for name in "qkv":
            tensors[f"model.layers.1.self_attn.{name}_proj.weight"] /= -0.2

    (tmp_path / "moved").mkdir()
    moved = change(tiny_models.save("llama", tmp_path / "moved"), move_scales)
    with pytest.raises(HesseError, match=r"layers.1.self_attn.q_proj: .* scales or rotations were moved"):
        repair(source, moved, tmp_path / "out")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("config", "edit", "said"),
    [
        ({"use_dora": True}, None, "has use_dora, which Hesse does not read"),
        ({"peft_type": "IA3"}, None, "has the peft_type IA3"),
        ({"r": None}, None, "lacks the rank r or lora_alpha"),
        ({}, {"base_model.model.elsewhere.lora_A.weight": torch.zeros(2, 2)}, "elsewhere.lora_A.weight, but"),
        ({}, {f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(RANK, 3)}, "belongs to another model"),
    ],
)
def test_an_adapter_that_is_not_understood_is_refused(
    config: dict[str, Any],
    edit: dict[str, Tensor] | None,
    said: str,
    compressed: FolderOf,
    family_folder: FolderOf,
    tmp_path: Path,
) -> None:
    base, adapter = compressed("packed"), tmp_path / "adapter"
    repair(family_folder("llama"), base, adapter)
    written = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**written, **config}))
    save_file({**load_file(adapter / WEIGHTS), **(edit or {})}, adapter / WEIGHTS)
    with pytest.raises(CheckpointError, match=said):
        hesse.evaluate(base, merge_adapter=adapter, data=OTHER_IDS)
    (adapter / WEIGHTS).write_bytes(b"nothing")
    (adapter / CONFIG).write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="cannot be read"):
        AdaptedCheckpoint(base, adapter, {})


def test_an_adapters_scale_is_alpha_over_r(compressed: FolderOf, family_folder: FolderOf, tmp_path: Path) -> None:
    base, adapter, name = compressed("packed"), tmp_path / "adapter", "model.layers.0.mlp.up_proj"
    repair(family_folder("llama"), base, adapter)
    once = AdaptedCheckpoint(base, adapter, {name: name} | {n: n for n in products(adapter)})
    written = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**written, "lora_alpha": 2 * RANK}))
    twice = AdaptedCheckpoint(base, adapter, {n: n for n in products(adapter)})
    plain = open_checkpoint(base).read([f"{name}.weight"])[f"{name}.weight"]
    added = [x.read([f"{name}.weight"])[f"{name}.weight"] - plain for x in (once, twice)]
    torch.testing.assert_close(added[1], 2 * added[0])


def test_the_command_line(
    compressed: FolderOf, family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path
) -> None:
    out, ids = tmp_path / "out", write_ids(tmp_path / "ids.jsonl")
    arguments = ("repair", family_folder("llama"), compressed("packed"), out, "--rank", str(RANK), "--data", ids)
    ran = hesse_command(*arguments, "--json")
    assert ran.code == 0
    report = json.loads(ran.stdout)
    assert report["loss"]["measured"] < report["loss_before"]["measured"]
    assert report == {**json.loads((out / "hesse-report.json").read_text()), "out": str(out)}
    assert hesse_command(*arguments).error == (
        f"Error: OUT {out} exists: give another name, or --overwrite to replace it"
    )
    ran = hesse_command(*arguments, "--overwrite")
    assert ran.code == 0
    assert "rank 6 added" in ran.stdout
    assert "PeftModel.from_pretrained" in ran.stdout
    ran = hesse_command("evaluate", compressed("packed"), "--merge-adapter", out, "--data", ids, "--json")
    assert json.loads(ran.stdout)["bytes"] == report["bytes_before"] + report["bytes_added"]
