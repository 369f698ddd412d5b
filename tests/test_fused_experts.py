"""Models whose tensors on disk are not those of the modules: experts in one tensor, fused queries, further heads.

Each result is loaded by plain transformers: no key may be missing or unexpected, and it computes what Hesse reads.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

import hesse
from helpers import IDS, WEIGHTS
from hesse.formats import open_checkpoint
from hesse.jobs.report import CompressionReport
from hesse.networks.network import CheckpointNetwork

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
DEEPSEEK = {
    "intermediate_size": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
DBRX = {
    "vocab_size": 512,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    "ffn_config": DbrxFFNConfig(hidden_size=64, ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
}


def save(model_type: str, folder: Path, settings: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    kind = AutoModelForCausalLM if model_type != "nomic_bert" else AutoModel
    model = kind.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def plain(folder: Path, kind: Any = AutoModelForCausalLM) -> Tensor:
    """Return the outputs of plain transformers, which must read the folder whole."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return outputs(model)


def outputs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(IDS[:2]))[0]


def read(folder: Path) -> Tensor:
    """Return the outputs of what Hesse reads."""
    network = CheckpointNetwork(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    with network.whole() as model:
        return outputs(model)


def compressed(source: Path, out: Path, **options: Any) -> CompressionReport:
    settings = {"bits": 4, "group_size": 32, **options}
    report = hesse.compress(source, out, method="rtn", options=hesse.Options(**settings), data=IDS, device="cpu").report
    assert isinstance(report, CompressionReport)
    return report


def changed(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def fuse_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the experts of a checkpoint as the hub has them for Qwen3.5."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for name in sorted(name for name in tensors if ".experts." in name):
        path, _, kind = re.sub(r"\.\d+\.(\w+)\.weight$", r"|\1", name).partition("|")
        found.setdefault(path, {}).setdefault(kind, []).append(tensors.pop(name))
    for path, kinds in found.items():
        gate, up, down = (torch.stack(kinds[kind]) for kind in ("gate_proj", "up_proj", "down_proj"))
        tensors |= {f"{path}.gate_up_proj": torch.cat((gate, up), 1), f"{path}.down_proj": down}
    return tensors


FAMILIES = {
    "gpt_oss": {**SIZES, "layer_types": ["full_attention"] * 2, "swiglu_limit": 0.3},
    "granitemoe": SIZES,
    "llama4_text": {**SIZES, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    "jetmoe": {**SIZES, "kv_channels": 16, "num_key_value_heads": 2, "num_attention_heads": 4},
    "deepseek_v3": {**SIZES, **DEEPSEEK},
    "dbrx": DBRX,
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_in_any_layout_are_compressed_and_load(model_type: str, tmp_path: Path) -> None:
    source = save(model_type, tmp_path / "model", FAMILIES[model_type])
    torch.testing.assert_close(read(source), plain(source), rtol=1e-4, atol=1e-4)
    report = compressed(source, tmp_path / "out")
    experts = [layer for layer in report.layers if re.search(r"experts\.\d+\.", layer.name)]
    assert len(experts) >= 4 * 2
    assert not any(re.search(r"router|\.gate$", layer.name) for layer in report.layers)
    wide = next((note for note in report.notes if "expert matrices are stored at full width" in note), None)
    assert (wide is None) == (model_type in ("llama4_text", "deepseek_v3"))
    assert wide is None or wide.startswith(f"{len(experts)} expert matrices")
    torch.testing.assert_close(read(tmp_path / "out"), plain(tmp_path / "out"), rtol=1e-4, atol=1e-4)
    assert (read(tmp_path / "out") - read(source)).abs().max() > 1e-3


def test_experts_stored_in_one_tensor_are_packed_one_by_one_where_transformers_reads_that(tmp_path: Path) -> None:
    settings = {**SIZES, "layer_types": ["full_attention"] * 2}
    source = save("qwen3_5_moe_text", tmp_path / "model", settings)
    before = plain(source)
    changed(source, fuse_experts)
    torch.testing.assert_close(plain(source), before)
    torch.testing.assert_close(read(source), before, rtol=1e-4, atol=1e-4)
    report = compressed(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert "model.layers.0.mlp.experts.3.up_proj.weight_packed" in stored
    assert "model.layers.0.mlp.experts.gate_up_proj" not in stored
    assert not any("full width" in note for note in report.notes)
    torch.testing.assert_close(read(tmp_path / "out"), plain(tmp_path / "out"), rtol=1e-4, atol=1e-4)


def test_dense_results_keep_the_layout_of_the_model(tmp_path: Path) -> None:
    source = save("gpt_oss", tmp_path / "model", FAMILIES["gpt_oss"])
    hesse.compress(source, tmp_path / "out", method="magnitude", data=IDS, device="cpu")
    before, after = (load_file(folder / WEIGHTS) for folder in (source, tmp_path / "out"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    zeros = (after["model.layers.0.mlp.experts.gate_up_proj"] == 0).float().mean()
    assert zeros == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(read(tmp_path / "out"), plain(tmp_path / "out"), rtol=1e-4, atol=1e-4)


def test_queries_keys_and_values_in_one_tensor(tmp_path: Path) -> None:
    settings = {**SIZES, "num_key_value_heads": 4, "n_embd": 64}
    source = save("nomic_bert", tmp_path / "model", settings)
    assert any("Wqkv" in name for name in load_file(source / WEIGHTS))
    torch.testing.assert_close(read(source), plain(source, AutoModel), rtol=1e-4, atol=1e-4)
    report = compressed(source, tmp_path / "out")
    assert any(layer.name.endswith("k_proj") for layer in report.layers)
    assert not any("Wqkv" in name for name in load_file(tmp_path / "out" / WEIGHTS))
    torch.testing.assert_close(read(tmp_path / "out"), plain(tmp_path / "out", AutoModel), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"bits": 4, "group_size": 128}, {"bits": 3, "group_size": 64}])
def test_shared_experts_beside_experts_keep_their_own_scheme(options: dict[str, Any], tmp_path: Path) -> None:
    settings = {**SIZES, **DEEPSEEK, "moe_intermediate_size": 32}
    source = save("deepseek_v3", tmp_path / "model", settings)
    compressed(source, tmp_path / "out", **options)
    torch.testing.assert_close(read(tmp_path / "out"), plain(tmp_path / "out"), rtol=1e-4, atol=1e-4)


def test_heads_for_further_tokens_are_kept_and_ignored_by_name(tmp_path: Path) -> None:
    source = save("deepseek_v3", tmp_path / "model", FAMILIES["deepseek_v3"])
    weight = torch.randn(64, 64)
    further = {"model.layers.2.eh_proj.weight": weight, "mtp.layers.0.mlp.up_proj.weight": weight.clone()}
    changed(source, lambda tensors: {**tensors, **further})
    compressed(source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(stored[name], value) for name, value in further.items())
    config = AutoConfig.from_pretrained(tmp_path / "out").quantization_config
    for name in further:
        assert is_match(name.removesuffix(".weight"), nn.Linear(1, 1), config["ignore"])
        for group in config["config_groups"].values():
            patterns = [target for target in group["targets"] if target.startswith("re:")]
            assert not patterns or not is_match(name.removesuffix(".weight"), nn.Linear(1, 1), patterns)
