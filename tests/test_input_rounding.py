"""Inputs that a loader rounds: stored so that transformers does it, measured and predicted as it does it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesse
import tiny_models
from helpers import IDS, OTHER_IDS, CommandLine, compress, compress_module, left_over, output, twin, write_ids
from hesse.constraints import Grid
from hesse.errors import CheckpointError, OptionError
from hesse.formats import open_checkpoint
from hesse.formats.codes import read_grid_code, stored_grid
from hesse.layerwise.solved_layer import rounding_cost
from hesse.methods import Recipe
from hesse.networks.network import CheckpointNetwork

FolderOf = Callable[[str], Path]
BYTES = {"bits": 8, "group_size": -1, "input_bits": 8}
# name: method, options, layout, bits of inputs
SETTINGS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "w8a8": ("rtn", BYTES, "int-quantized", 8),
    "w4a8": ("gptq", {"bits": 4, "group_size": 32, "input_bits": 8}, "pack-quantized", 8),
    "w3a4": ("kronecker", {"bits": 3, "group_size": 32, "input_bits": 4}, "pack-quantized", 4),
    "narrow group": ("rtn", {"bits": 8, "group_size": 40, "input_bits": 8}, "int-quantized", 8),
    "smoothquant": ("smoothquant", {}, "int-quantized", 8),
    "qqq": ("qqq", {"group_size": 32}, "pack-quantized", 8),
    "quarot": ("quarot", {"group_size": 32, "input_bits": 4}, "pack-quantized", 4),
}


def plainly_rounded(inputs: Tensor, bits: int) -> Tensor:
    """Each token to the nearest of 2^bits steps that reach over its largest input."""
    scale = inputs.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return (inputs / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def round_inputs(model: nn.Module, bits: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, given: plainly_rounded(given[0], bits))


def rounded_to_float8(inputs: Tensor) -> Tensor:
    """Each token to FP8 with the largest input at the largest value."""
    scale = inputs.abs().amax(-1, keepdim=True) / 448
    return (inputs / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(inputs.dtype) * scale


@pytest.mark.parametrize("method", ["fp8", "fp8-block"])
def test_float8_inputs_are_rounded_by_transformers_and_predicted(
    method: str, family_folder: FolderOf, tmp_path: Path
) -> None:
    source, out = family_folder("qwen2"), tmp_path / "out"
    report = compress(source, out, method=method)
    assert report.format == "float-quantized"
    assert 8 < report.bits_per_weight < 9
    dense = tiny_models.load("qwen2", twin(out, tmp_path / "twin", source))
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, given: rounded_to_float8(given[0]))
    assert torch.equal(output(tiny_models.load("qwen2", out)), output(dense))
    assert 0.5 < report.loss.measured / report.loss.predicted < 2


@pytest.mark.parametrize(("setting", "half"), [*((name, True) for name in SETTINGS), ("w8a8", False), ("qqq", False)])
def test_transformers_rounds_inputs_and_hesse_measures_it(
    setting: str, half: bool, family_folder: FolderOf, half_folder: FolderOf, tmp_path: Path
) -> None:
    method, options, layout, bits = SETTINGS[setting]
    source, out = (half_folder if half else family_folder)("qwen2"), tmp_path / "out"
    report = compress(source, out, method=method, **options)
    assert report.format == layout
    model = tiny_models.load("qwen2", out)
    dense = tiny_models.load("qwen2", twin(out, tmp_path / "twin", source))
    if method == "quarot":
        dense.lm_head.weight = model.lm_head.weight
    unrounded = output(dense)
    round_inputs(dense, bits)
    assert torch.equal(output(model), output(dense))
    assert not torch.equal(output(model), unrounded)
    wide = tiny_models.load("qwen2", tmp_path / "twin", dtype=torch.float32)
    if method == "quarot":
        wide.lm_head.weight = nn.Parameter(model.lm_head.weight.float())
    round_inputs(wide, bits)
    loss = nn.functional.cross_entropy(output(wide)[:, :-1].flatten(0, 1), torch.tensor(OTHER_IDS)[:, 1:].flatten())
    assert hesse.evaluate(out, data=OTHER_IDS).report.model_loss == pytest.approx(loss.item(), abs=2e-4)


def test_a_token_is_a_row_of_a_grid(family_folder: FolderOf, tmp_path: Path) -> None:
    """The arithmetic of the loader, the plain one, and the grid that scales are searched with."""
    compress(family_folder("llama"), tmp_path / "out", method="rtn", **BYTES)
    rounding = open_checkpoint(tmp_path / "out").input_rounding("model.layers.0.mlp.up_proj")
    inputs = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    assert rounding is not None
    assert torch.equal(rounding(inputs), plainly_rounded(inputs, 8))
    assert torch.equal(rounding(inputs).flatten(0, 1), Grid(8, -1).nearest(inputs.flatten(0, 1)))
    assert torch.equal(rounding(torch.zeros(1, 2, 4)), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("whole", [False, True])
def test_the_cost_of_rounding_is_what_it_is_by_simulation(bits: int, whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 48, generator=generator).double() * torch.rand(4000, 1, generator=generator)
    weight, root = (torch.randn(*size, generator=generator).double() for size in ((20, 48), (20, 20)))
    factor = root @ root.T
    sensitivity = factor if whole else factor.diagonal()
    errors = (plainly_rounded(inputs, bits) - inputs) @ weight.T
    metric = factor if whole else factor.diagonal().diag()
    simulated = 0.5 * float(((errors @ metric) * errors).sum(-1).mean())
    square_peak = float(inputs.abs().amax(-1).square().mean())
    assert rounding_cost(weight, sensitivity, square_peak, bits) == pytest.approx(simulated, rel=0.015)


@pytest.mark.parametrize("setting", ["w8a8", "w3a4"])
def test_the_prediction_counts_inputs(setting: str, family_folder: FolderOf, tmp_path: Path) -> None:
    method, options, _, bits = SETTINGS[setting]
    report = compress(family_folder("llama"), tmp_path / "out", method=method, **options)
    inputs = sum(layer.predicted_input_loss or 0.0 for layer in report.layers)
    weights = sum(layer.predicted_loss_increase or 0.0 for layer in report.layers)
    assert all(layer.input_bits == bits and layer.predicted_input_loss for layer in report.layers)
    assert report.loss.predicted == pytest.approx(weights + inputs)
    assert 0.2 < inputs / report.loss.predicted < 0.95
    assert 0.7 < report.loss.measured / report.loss.predicted < 1.4


def test_bits_on_disk_are_those_that_are_said(family_folder: FolderOf, tmp_path: Path) -> None:
    report = compress(family_folder("llama"), tmp_path / "out", method="rtn", **BYTES)
    checkpoint = open_checkpoint(tmp_path / "out")
    names = [f"{layer.name}.{part}" for layer in report.layers for part in ("weight", "weight_scale")]
    stored = checkpoint.read_stored(names)
    assert all(stored[f"{layer.name}.weight"].dtype == torch.int8 for layer in report.layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert report.bits_per_weight == pytest.approx(8 * sum(tensor.nbytes for tensor in stored.values()) / weights)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_bytes_are_exported_as_they_are_and_what_is_lost_is_said(
    target: str, family_folder: FolderOf, tmp_path: Path
) -> None:
    pytest.importorskip(target)
    out = tmp_path / "out"
    compress(family_folder("llama"), out, method="rtn", **BYTES)
    checkpoint, layer = open_checkpoint(out), "model.layers.1.self_attn.v_proj"
    grid = stored_grid(checkpoint, layer)
    assert grid == Grid(8, -1)
    assert torch.equal(
        grid.decode(read_grid_code(checkpoint, layer)), checkpoint.read([f"{layer}.weight"])[f"{layer}.weight"]
    )
    report = hesse.export(out, tmp_path / f"model.{target}", to=target).report
    assert len(report.layers) == 14
    assert any("14 layers: inputs are not rounded" in note for note in report.notes)


def test_layers_may_differ(half_folder: FolderOf, tmp_path: Path) -> None:
    """Some with rounded inputs, some without, some left alone: each as its rule says."""
    source, out = half_folder("llama"), tmp_path / "out"
    grid = {"grid": {"bits": 4, "group_size": 32}}
    rounding = {"curvature": "identity", "constraint": grid, "solver": {"name": "nearest"}}
    rules = [{"layers": ["*.mlp.*"], **rounding, "input_bits": 8}, {"layers": ["*"], **rounding}]
    compress(source, out, recipe=Recipe.model_validate({"rules": rules, "ignore": ["down_proj"]}))
    dense = tiny_models.load("llama", twin(out, tmp_path / "twin", source))
    for name, module in dense.named_modules():
        if name.endswith(("gate_proj", "up_proj")):
            module.register_forward_pre_hook(lambda _, given: plainly_rounded(given[0], 8))
    assert torch.equal(output(tiny_models.load("llama", out)), output(dense))


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("llama", {"format": "dense"}, "dense weights are loaded without rounding inputs"),
        ("llama", {"symmetric": False}, "asymmetric grids and the layers of GPT-2 and Falcon load as dense"),
        ("gpt2", {}, "asymmetric grids and the layers of GPT-2 and Falcon load as dense"),
        ("mixtral", {"ignore": ["self_attn"]}, "experts.* cannot be rounded: transformers keeps experts in one tensor"),
        ("llama", {"target": "vllm"}, "vllm rounds inputs only to 8 bits, and only for weights of 8 bits"),
        ("llama", {"format": "int-quantized"}, "int-quantized stores 4 bits in a whole byte"),
        ("llama", {"input_bits": 1}, "--input-bits is 1, but must be between 2 and 8"),
        ("llama", {"bits": None, "mean_bits": 3.5}, "a budget counts what weights cost, not their inputs"),
        ("llama", {"method": "quip"}, "--input-bits has no meaning for the method quip"),
        (
            "llama",
            {"method": "svd", "bits": None, "group_size": None},
            "no meaning for the method svd",
        ),
    ],
)
def test_what_no_loader_rounds_is_refused(
    family: str, options: dict[str, Any], said: str, family_folder: FolderOf, tmp_path: Path
) -> None:
    given = {"method": "rtn", "bits": 4, "group_size": 32, "input_bits": 8, **options}
    with pytest.raises(OptionError, match=said):
        compress(family_folder(family), tmp_path / "out", **given)
    assert not left_over(tmp_path)


def test_vllm_is_given_what_it_serves(family_folder: FolderOf, tmp_path: Path) -> None:
    compress(family_folder("llama"), tmp_path / "out", method="rtn", target="vllm", **BYTES)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    assert (config["format"], group["format"], group["input_activations"]) == ("int-quantized", "int-quantized", inputs)
    assert group["weights"] == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def test_modules_do_not_round_inputs() -> None:
    with pytest.raises(OptionError, match="inputs are rounded in language models on disk"):
        compress_module(nn.Sequential(nn.Linear(4, 4)), [], method="rtn", options=hesse.Options(**BYTES))


def test_without_inputs_the_prediction_says_what_it_leaves_out(family_folder: FolderOf, tmp_path: Path) -> None:
    source = family_folder("llama")
    hesse.estimate(source, tmp_path / "stats", data=write_ids(tmp_path / "ids.jsonl"))
    settings = {"method": "rtn", "statistics": tmp_path / "stats", "data": None, **BYTES}
    report = compress(source, tmp_path / "out", **settings)
    notes = [note for note in report.notes if "the prediction leaves out that its inputs are rounded" in note]
    assert len(notes) == len(report.layers)


@pytest.mark.parametrize(
    "change",
    [{"dynamic": False, "strategy": "tensor"}, {"dynamic": "local", "strategy": "tensor_group", "group_size": 16}],
)
def test_stored_scales_of_inputs_are_refused(change: dict[str, Any], family_folder: FolderOf, tmp_path: Path) -> None:
    compress(family_folder("llama"), tmp_path / "out", method="rtn", **BYTES)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(change)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="q_proj rounds its inputs with stored scales"):
        CheckpointNetwork(open_checkpoint(tmp_path / "out"), torch.float32, torch.device("cpu"))


def test_the_command_line_has_it(family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path) -> None:
    printed = hesse_command("compress", "M", "--method", "gptq", "--input-bits", "8", "--print-recipe").stdout
    assert "input_bits: 8" in printed
    ids = write_ids(tmp_path / "ids.jsonl", IDS)
    arguments = ("--method", "smoothquant", "--data", ids, "--json")
    report = json.loads(hesse_command("compress", family_folder("llama"), tmp_path / "out", *arguments).stdout)
    assert report["recipe"]["rewrite"] == "smoothing"
    assert all(layer["input_bits"] == 8 for layer in report["layers"])
