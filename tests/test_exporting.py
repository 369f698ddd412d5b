"""What is exported holds the codes and scales that it was made of, and the runtimes compute what transformers does."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import hesse
import tiny_models
from helpers import CommandLine, compress, dense_tensors, left_over, output, twin
from hesse.constraints import Grid
from hesse.errors import CheckpointError, OptionError, OutputError, UnsupportedModelError
from hesse.formats import open_checkpoint
from hesse.formats.codes import read_grid_code, stored_grid
from hesse.runtimes import export
from hesse.runtimes.gguf_blocks import block_type, to_blocks
from hesse.runtimes.gguf_families import rotary_factors

FolderOf = Callable[[str], Path]
IDS = tiny_models.random_ids(2, 12, seed=3)
GGUF_FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gpt-neox", "gpt2")
ONNX_FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
# Bits, group size, symmetric; and what GGUF stores such codes as.
GRIDS = {
    (2, 32, True): "Q4_0",
    (3, 32, False): "Q4_0",
    (4, 32, True): "Q4_0",
    (4, 64, True): "Q4_0",
    (4, 32, False): "Q4_1",
    (5, 32, True): "Q5_0",
    (5, 32, False): "Q5_1",
    (6, 32, False): "Q8_0",
    (7, -1, False): "Q8_0",
    (8, 32, True): "Q8_0",
    (8, -1, True): "Q8_0",
}


def rounded(source: Path, out: Path, bits: int, group_size: int, symmetric: bool = True) -> Path:
    compress(source, out, method="rtn", bits=bits, group_size=group_size, symmetric=symmetric)
    return out


def gguf_tensors(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and values of each tensor of a GGUF file, by the gguf package's own decoding."""
    gguf = pytest.importorskip("gguf")
    return {
        tensor.name: (tensor.tensor_type.name, torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(path).tensors
    }


def products(folder: Path, layer: str) -> tuple[Tensor, Tensor]:
    """(codes - zero point) · scale of a stored layer in float64, and its scales for each column."""
    checkpoint = open_checkpoint(folder)
    grid, code = stored_grid(checkpoint, layer), read_grid_code(checkpoint, layer)
    assert grid is not None
    columns = code.codes.shape[1]
    codes, scale = code.codes.double(), grid.expand(code.scales.scale, columns).double()
    if code.scales.zero_point is not None:
        codes = codes - grid.expand(code.scales.zero_point, columns)
    return codes * scale, scale


class TestCodes:
    @pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_are_those_that_decode_to_the_weight(
        self, family: str, bits: int, group_size: int, symmetric: bool, half_folder: FolderOf, tmp_path: Path
    ) -> None:
        out = rounded(half_folder(family), tmp_path / "out", bits, group_size, symmetric)
        checkpoint, dense = open_checkpoint(out), dense_tensors(out)
        layers = [name.removesuffix(".weight") for name in dense if stored_grid(checkpoint, name[: -len(".weight")])]
        assert len(layers) == (14 if family == "llama" else 8)
        for layer in layers:
            grid = stored_grid(checkpoint, layer)
            assert grid is not None
            assert (grid.bits, grid.symmetric, grid.dtype) == (bits, symmetric, torch.bfloat16)
            decoded = grid.decode(read_grid_code(checkpoint, layer))
            weight = dense[f"{layer}.weight"].float()
            assert torch.equal(decoded, weight.T if family == "gpt2" else weight)

    def test_a_narrower_last_group(self, half_folder: FolderOf, tmp_path: Path) -> None:
        out = rounded(half_folder("llama"), tmp_path / "out", 4, 20)
        checkpoint = open_checkpoint(out)
        layer = "model.layers.0.mlp.up_proj"
        grid = stored_grid(checkpoint, layer)
        assert grid is not None
        assert torch.equal(
            grid.decode(read_grid_code(checkpoint, layer)), dense_tensors(out)[f"{layer}.weight"].float()
        )

    def test_a_dense_layer_has_none(self, half_folder: FolderOf) -> None:
        assert stored_grid(open_checkpoint(half_folder("llama")), "model.layers.0.mlp.up_proj") is None


class TestGguf:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("gguf")

    @pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
    def test_codes_and_scales_are_carried_over(
        self, bits: int, group_size: int, symmetric: bool, half_folder: FolderOf, tmp_path: Path
    ) -> None:
        out = rounded(half_folder("qwen2"), tmp_path / "out", bits, group_size, symmetric)
        report = hesse.export(out, tmp_path / "out.gguf", to="gguf").report
        expected = GRIDS[bits, group_size, symmetric]
        assert report.stored == {expected: 14}
        found = gguf_tensors(tmp_path / "out.gguf")
        for layer, name in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
            wanted, scale = products(out, f"model.layers.1.{layer}")
            kind, weight = found[f"blk.1.{name}.weight"]
            assert kind == expected
            if expected.endswith("_1"):
                # The offset, up to 2^bits - 1 steps, is rounded to the 11 significant bits of float16.
                assert ((weight - wanted).abs() / scale).max() <= 2**bits * 2.0**-11
            else:
                assert torch.equal(weight.double(), wanted)
        assert report.exact_layers == (0 if expected.endswith("_1") else 14)
        assert any("zero points times scales are rounded" in note for note in report.notes) == expected.endswith("_1")

    def test_scales_of_float32_are_rounded_and_it_is_said(self, family_folder: FolderOf, tmp_path: Path) -> None:
        out = rounded(family_folder("qwen2"), tmp_path / "out", 4, 32)
        report = hesse.export(out, tmp_path / "out.gguf").report
        worst = max(layer.scale_error for layer in report.layers)
        assert 0 < worst <= 2.0**-11
        assert any("scales are rounded" in note and f"{worst:.2g}" in note for note in report.notes)
        wanted, scale = products(out, "model.layers.0.mlp.up_proj")
        _, weight = gguf_tensors(tmp_path / "out.gguf")["blk.0.ffn_up.weight"]
        assert torch.equal((weight / scale).round(), (wanted / scale).round())
        assert ((weight - wanted).abs() <= worst * wanted.abs() * (1 + 1e-9)).all()

    @pytest.mark.parametrize("family", ["llama", "gpt-neox"])
    def test_rows_are_reordered_and_no_more(self, family: str, half_folder: FolderOf, tmp_path: Path) -> None:
        source = half_folder(family)
        hesse.export(source, tmp_path / "out.gguf")
        found, dense = gguf_tensors(tmp_path / "out.gguf"), dense_tensors(source)
        if family == "llama":
            wanted = dense["model.layers.0.self_attn.k_proj.weight"].float()
            got = found["blk.0.attn_k.weight"][1]
            # Row 1 of a head of 16 is what turns with row 0: row 8 of transformers.
            assert torch.equal(got[[0, 1, 16, 17]], wanted[[0, 8, 16, 24]])
        else:
            wanted = dense["gpt_neox.layers.0.attention.query_key_value.weight"].float()
            got = found["blk.0.attn_qkv.weight"][1]
            # Queries of all four heads, then keys: transformers has query, key, value of 16 rows each, head by head.
            assert torch.equal(got[[0, 16, 64, 80]], wanted[[0, 48, 16, 64]])
        assert torch.equal(got.sort(0).values, wanted.sort(0).values)

    def test_a_dense_model_is_bit_for_bit_itself(self, half_folder: FolderOf, tmp_path: Path) -> None:
        report = hesse.export(half_folder("qwen3"), tmp_path / "out.gguf").report
        assert report.layers == []
        assert set(report.dense) == {"BF16", "F32"}
        dense, found = dense_tensors(half_folder("qwen3")), gguf_tensors(tmp_path / "out.gguf")
        assert len(found) == len(dense) == report.tensors_checked
        assert torch.equal(found["blk.1.ffn_gate.weight"][1], dense["model.layers.1.mlp.gate_proj.weight"].float())
        assert torch.equal(
            found["blk.1.attn_q_norm.weight"][1], dense["model.layers.1.self_attn.q_norm.weight"].float()
        )

    def test_the_default_model_has_its_tokenizer(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        report = hesse.export("default", tmp_path / "default.gguf").report
        assert report.notes == []
        fields = gguf.GGUFReader(tmp_path / "default.gguf").fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        assert (len(tokens), tokens[0], tokens[1]) == (4096, "<|endoftext|>", "!")
        assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
        assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
        assert fields["llama.context_length"].contents() == 512

    def test_layers_that_do_not_fit_stay_dense_and_it_is_said(self, half_folder: FolderOf, tmp_path: Path) -> None:
        # Rows of 96 columns in one group are three blocks; groups of 16 are half of one.
        recipe = tmp_path / "recipe.yaml"
        rest = "curvature: identity, solver: {name: nearest}"
        rows = f"{{layers: ['*.down_proj'], {rest}, constraint: {{grid: {{bits: 4, group_size: -1}}}}}}"
        others = f"{{{rest}, constraint: {{grid: {{bits: 4, group_size: 16}}}}}}"
        recipe.write_text(f"rules: [{rows}, {others}]", encoding="utf-8")
        out = tmp_path / "out"
        compress(half_folder("llama"), out, recipe=hesse.methods.load_recipe(recipe))
        report = hesse.export(out, tmp_path / "out.gguf").report
        assert report.stored == {"BF16": 12, "Q4_0": 2}
        assert any("12 layers of 4 bit, groups of 16, symmetric are stored as BF16" in note for note in report.notes)

    @pytest.mark.parametrize("family", GGUF_FAMILIES)
    @pytest.mark.parametrize("grid", [None, (4, 32, True), (8, 32, True)])
    def test_llama_cpp_computes_what_transformers_does(
        self, family: str, grid: tuple[int, int, bool] | None, half_folder: FolderOf, tmp_path: Path
    ) -> None:
        llama_cpp = pytest.importorskip("llama_cpp")
        source = half_folder(family)
        folder = source if grid is None else rounded(source, tmp_path / "out", *grid)
        hesse.export(folder, tmp_path / "out.gguf")
        dense = tiny_models.load(family, twin(folder, tmp_path / "twin", source), dtype=torch.float32)
        model = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=32, n_threads=1, logits_all=True, verbose=False)
        for ids in IDS:
            model.reset()
            model.eval(ids)
            got, wanted = torch.tensor(np.array(model.scores[: len(ids)])), output(dense, [ids])[0]
            # llama.cpp rounds what goes into a product: to bfloat16, or to 8 bits in blocks of 32.
            assert (got - wanted).abs().max() < (0.05 if grid is None else 0.2) * wanted.std()

    def test_stretched_rotary_waves_are_those_of_transformers(self, half_folder: FolderOf, tmp_path: Path) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        folder = tiny_models.save("llama", tmp_path / "model", torch.bfloat16, rope_parameters=rope)
        config = AutoConfig.from_pretrained(folder)
        factors = rotary_factors(config)
        assert factors is not None
        plain = 10000.0 ** -(torch.arange(8) / 8)
        assert torch.allclose(plain / factors, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6)
        hesse.export(folder, tmp_path / "out.gguf")
        assert torch.equal(gguf_tensors(tmp_path / "out.gguf")["rope_freqs.weight"][1], factors)


@pytest.mark.parametrize(
    ("grid", "columns", "expected"),
    [
        (Grid(4, 32), 48, None),  # half a block at the end of a row
        (Grid(4, 48), 96, None),  # a block with two scales
        (Grid(4, 96), 192, "Q4_0"),
        (Grid(8, 32, symmetric=False), 64, None),  # differences of nine bits
        (Grid(7, 32, symmetric=False), 64, "Q8_0"),
        (Grid(2, -1), 64, "Q4_0"),
    ],
)
def test_the_smallest_type_that_holds_every_code(grid: Grid, columns: int, expected: str | None) -> None:
    assert block_type(grid, columns) == expected


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    grid = Grid(4, 32)
    with pytest.raises(CheckpointError, match="float16 ends at 65504"):
        to_blocks(grid, grid.encode(torch.full((2, 32), 1e9)), "Q4_0")


class TestOnnx:
    @pytest.fixture(autouse=True)
    def _packages(self) -> None:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")

    def logits(self, folder: Path, config: object, split: int) -> Tensor:
        """Logits of IDS, read in two pieces, with products in float32 in place of 8-bit inputs."""
        import onnx
        import onnxruntime

        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
        onnx.save(model, folder / "float32.onnx")
        session = onnxruntime.InferenceSession(folder / "float32.onnx")
        found = []
        for ids in np.array(IDS)[:, None]:  # with a past, the operator takes several tokens of one sample only
            past = {
                entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
                for entry in session.get_inputs()
                if entry.name.startswith("past")
            }
            for start, end in ((0, split), (split, ids.shape[1])):
                inputs = {"input_ids": ids[:, start:end], "attention_mask": np.ones((1, end), np.int64)}
                logits, *present = session.run(None, {**inputs, "num_logits_to_keep": np.array(0), **past})
                past = dict(zip(past, present, strict=True))
                found.append(torch.tensor(logits[0]))
        return torch.cat(found).view(*np.shape(IDS), -1)

    @pytest.mark.parametrize("family", ONNX_FAMILIES)
    @pytest.mark.parametrize("grid", [None, (4, 32, True), (4, 48, False), (3, 16, False), (8, -1, True)])
    def test_onnxruntime_computes_what_transformers_does(
        self, family: str, grid: tuple[int, int, bool] | None, family_folder: FolderOf, tmp_path: Path
    ) -> None:
        source = family_folder(family)
        folder = source if grid is None else rounded(source, tmp_path / "out", *grid)
        report = hesse.export(folder, tmp_path / "onnx", to="onnx").report
        assert report.exact_layers == len(report.layers) == (0 if grid is None else 14)
        dense = tiny_models.load(family, twin(folder, tmp_path / "twin", source))
        got, wanted = self.logits(tmp_path / "onnx", dense.config, 7), output(dense, IDS)
        assert torch.allclose(got, wanted, atol=2e-5 * float(wanted.std()), rtol=0)

    def test_only_the_last_logits_if_asked(self, family_folder: FolderOf, tmp_path: Path) -> None:
        import onnxruntime

        hesse.export(family_folder("llama"), tmp_path / "onnx", to="onnx")
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
        empty = {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
        inputs = {"input_ids": np.array(IDS[:1]), "attention_mask": np.ones((1, 12), np.int64), **empty}
        whole, one = (session.run(["logits"], {**inputs, "num_logits_to_keep": np.array(n)})[0] for n in (0, 1))
        assert (whole.shape, one.shape) == ((1, 12, 512), (1, 1, 512))
        assert np.allclose(whole[:, -1:], one, atol=1e-6)


class TestTorchao:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("torchao")

    @pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
    @pytest.mark.parametrize(
        ("grid", "stored"),
        [
            ((4, 32, True), "Int4OpaqueTensor"),
            ((3, 32, False), "Int4OpaqueTensor"),
            ((8, -1, True), "Int8Tensor"),
            ((6, 32, True), "Int8Tensor"),
            (None, None),
        ],
    )
    def test_the_loaded_model_computes_what_transformers_does(
        self,
        family: str,
        grid: tuple[int, int, bool] | None,
        stored: str | None,
        family_folder: FolderOf,
        tmp_path: Path,
    ) -> None:
        from hesse.runtimes.torchao_folder import load_torchao

        source = family_folder(family)
        folder = source if grid is None else rounded(source, tmp_path / "out", *grid)
        report = hesse.export(folder, tmp_path / "torchao", to="torchao").report
        assert report.stored == ({} if stored is None else {stored: 14})
        # Only the offsets of asymmetric grids are rounded, to float32 here.
        assert all(layer.exact or 0 < layer.offset_error < 1e-6 for layer in report.layers)
        dense = tiny_models.load(family, twin(folder, tmp_path / "twin", source))
        got, wanted = output(load_torchao(tmp_path / "torchao"), IDS), output(dense, IDS)
        assert torch.allclose(got, wanted, atol=2e-5 * float(wanted.std()), rtol=0)

    def test_offsets_that_bfloat16_rounds_are_told(self, half_folder: FolderOf, tmp_path: Path) -> None:
        out = rounded(half_folder("llama"), tmp_path / "out", 4, 32, symmetric=False)
        report = hesse.export(out, tmp_path / "torchao", to="torchao").report
        assert report.exact_layers < 14
        assert any("zero points times scales are rounded" in note for note in report.notes)

    def test_a_folder_that_is_none_of_ours(self, tmp_path: Path) -> None:
        from hesse.runtimes.torchao_folder import load_torchao

        with pytest.raises(CheckpointError, match=r"has no model\.pt"):
            load_torchao(tmp_path)


class TestBadInput:
    def test_an_unknown_target(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"there is no target 'exl2'.*gguf, onnx, torchao"):
            hesse.export("default", tmp_path / "out", to="exl2")

    @pytest.mark.parametrize("target", ["gguf", "onnx", "torchao"])
    def test_a_missing_package(self, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(export, "find_spec", lambda name: None)
        with pytest.raises(OptionError, match=rf"exporting to {target} needs .*pip install 'hesse\[{target}\]'"):
            hesse.export("default", tmp_path / "out", to=target)
        assert left_over(tmp_path) == []

    @pytest.mark.parametrize(("target", "family"), [("gguf", "gemma2"), ("gguf", "mixtral"), ("onnx", "gpt2")])
    def test_a_family_that_is_not_written(
        self, target: str, family: str, family_folder: FolderOf, tmp_path: Path
    ) -> None:
        pytest.importorskip(target)
        with pytest.raises(UnsupportedModelError, match=f"of the family '{family}' is not written; the families are"):
            hesse.export(family_folder(family), tmp_path / "out", to=target)
        assert left_over(tmp_path) == []

    def test_experts_in_torchao(self, family_folder: FolderOf, tmp_path: Path) -> None:
        pytest.importorskip("torchao")
        with pytest.raises(UnsupportedModelError, match="experts"):
            hesse.export(family_folder("mixtral"), tmp_path / "out", to="torchao")

    def test_a_function_that_llama_cpp_does_not_compute(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        folder = tiny_models.save("llama", tmp_path / "model", hidden_act="relu")
        with pytest.raises(UnsupportedModelError, match="hidden_act 'relu'"):
            hesse.export(folder, tmp_path / "out.gguf")

    def test_a_grid_that_does_not_fit(self, half_folder: FolderOf, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        out = rounded(half_folder("llama"), tmp_path / "model", 4, 16)
        with pytest.raises(OptionError, match=r"multiples of 32.*has 4 bit, groups of 16, symmetric"):
            hesse.export(out, tmp_path / "out", to="gguf")
        assert left_over(tmp_path) == []

    def test_factorised_layers(self, family_folder: FolderOf, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        compress(family_folder("llama"), tmp_path / "model", method="svd", rank=8)
        with pytest.raises(OptionError, match="factorised"):
            hesse.export(tmp_path / "model", tmp_path / "out", to="gguf")

    def test_an_output_that_exists(self, half_folder: FolderOf, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        out = tmp_path / "out"
        out.write_text("mine", encoding="utf-8")
        with pytest.raises(OutputError, match="exists"):
            hesse.export(half_folder("qwen2"), out)
        assert out.read_text(encoding="utf-8") == "mine"
        hesse.export(half_folder("qwen2"), out, overwrite=True)
        assert out.read_bytes()[:4] == b"GGUF"
        out.unlink()
        out.mkdir()
        with pytest.raises(OutputError, match="not a file"):
            hesse.export(half_folder("qwen2"), out, overwrite=True)
        with pytest.raises(OutputError, match="does not exist"):
            hesse.export(half_folder("qwen2"), tmp_path / "nowhere" / "out")

    def test_a_damaged_checkpoint_leaves_nothing(self, half_folder: FolderOf, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        out = rounded(half_folder("llama"), tmp_path / "model", 4, 32)
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64
        (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(CheckpointError, match="scales of shape"):
            hesse.export(out, tmp_path / "out")
        assert left_over(tmp_path) == []


def test_the_command_prints_for_people_and_machines(
    half_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    out = rounded(half_folder("llama"), tmp_path / "model", 4, 32)
    ran = hesse_command("export", out, tmp_path / "a.gguf")
    assert ran.code == 0
    for expected in ("Q4_0", "4 bit, groups of 32, symmetric", "exactly: 14 of 14 layers", "token ids only"):
        assert expected in " ".join(ran.stdout.split())
    ran = hesse_command("export", out, tmp_path / "b.gguf", "--json")
    assert (ran.code, ran.stderr) == (0, "")
    content = json.loads(ran.stdout)
    assert content["bytes_after"] == (tmp_path / "b.gguf").stat().st_size
    assert (tmp_path / "a.gguf").stat().st_size == content["bytes_after"]
    ran = hesse_command("export", out, tmp_path / "b.gguf")
    assert (ran.code, "exists" in ran.error) == (1, True)
