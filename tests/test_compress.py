"""The main job on tiny models: what is written, what other programs load, and what is said about it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import hesse
import tiny_models
from helpers import (
    IDS,
    OTHER_IDS,
    WEIGHTS,
    change,
    compress,
    dense_tensors,
    left_over,
    output,
    sha256,
    twin,
)
from hesse.checkpoints import writer
from hesse.checkpoints.checkpoint import INDEX, Checkpoint
from hesse.errors import VerificationError
from hesse.jobs import job
from hesse.layerwise import solved_layer
from hesse.layerwise.layer_solver import Effect
from hesse.methods import Recipe, Rule, methods_of
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import GridOptions
from hesse.methods.solver_options import SolverOptions
from hesse.networks.network import Block, CheckpointNetwork

COMPRESSING = methods_of("compress")

FolderOf = Callable[[str], Path]
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe")
LAYERS = [
    f"model.layers.{block}.{layer}"
    for block in range(2)
    for layer in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
]
IN_ORDER = [f"model.layers.{b}.{part}" for b in range(2) for part in ("self_attn", "mlp")]


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_transformers_loads_the_very_weights_that_were_solved(name: str, half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder(name), tmp_path / "out"
    report = compress(source, out, bits=4, group_size=32)
    dense = tiny_models.load(name, twin(out, tmp_path / "twin", source))
    assert dense.dtype == torch.bfloat16
    assert torch.equal(output(tiny_models.load(name, out)), output(dense))

    layers = {layer.name for layer in report.layers}
    assert layers == {
        layer.name for layer in CheckpointNetwork(Checkpoint(source), torch.float32, torch.device("cpu")).layers
    }
    assert report.tensors_equal == len(Checkpoint(source).names())
    known = ("tokens for",) if name in MIXTURES else ("inputs are always zero",) if name == "opt" else ()
    unusual = [note for note in report.notes if "stay dense" not in note]
    assert [note for note in unusual if not any(kind in note for kind in known)] == []
    assert all(note.split(":")[0] in layers for note in unusual)
    assert 1 / 4 < report.loss.predicted / report.loss.measured < 3  # of few tokens, so too hopeful
    assert report.loss.predicted == pytest.approx(sum(layer.predicted_loss_increase or 0.0 for layer in report.layers))
    kind = "half squared error of hidden states" if name in tiny_models.ENCODERS else "KL(dense || compressed)"
    assert report.loss.name == kind
    assert report.bytes_before == (source / WEIGHTS).stat().st_size
    assert report.bytes_after == (out / WEIGHTS).stat().st_size < report.bytes_before


def test_other_programs_load_every_width_without_hesse(half_folder: FolderOf, tmp_path: Path) -> None:
    """One process that never imports Hesse loads 2, 3, 4 and 8 bits; evaluate sees the same model."""
    widths = (2, 3, 4, 8)
    source = half_folder("llama")
    for bits in widths:
        compress(source, tmp_path / f"out-{bits}", bits=bits, group_size=32)
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, found = torch.tensor({OTHER_IDS}), {{}}
for bits in {widths}:
    with torch.no_grad():
        found[str(bits)] = AutoModelForCausalLM.from_pretrained(f"out-{{bits}}").eval()(input_ids=ids).logits
assert "hesse" not in sys.modules
torch.save(found, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, timeout=600)
    found = torch.load(tmp_path / "logits.pt")
    for bits in widths:
        folder = twin(tmp_path / f"out-{bits}", tmp_path / f"twin-{bits}", source)
        assert torch.equal(found[str(bits)], output(tiny_models.load("llama", folder)))
        logits = output(tiny_models.load("llama", folder, dtype=torch.float32))[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(OTHER_IDS)[:, 1:].flatten())
        assert hesse.evaluate(tmp_path / f"out-{bits}", data=OTHER_IDS).report.model_loss == pytest.approx(
            loss.item(), abs=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_asymmetric_grids_load(name: str, half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder(name), tmp_path / "out"
    compress(source, out, bits=3, group_size=32, symmetric=False)
    dense = tiny_models.load(name, twin(out, tmp_path / "twin", source))
    assert torch.equal(output(tiny_models.load(name, out)), output(dense))


# Those that round inputs too are in test_input_rounding.py.
@pytest.mark.parametrize("method", [name for name, row in COMPRESSING.items() if row.defaults.input_bits is None])
def test_every_method_writes_what_it_says(method: str, half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    own = COMPRESSING[method].basis == "own"
    family = " + ".join(COMPRESSING[method].constraints)
    options = {"grid": {"group_size": 32}, "sparse": {"sparsity": 0.5}, "low_rank": {"rank": 24}}
    options["grid + low_rank"] = options["table + low_rank"] = {"group_size": 32, "rank": 8}
    options["sparse + low_rank"] = {"sparsity": 0.5, "rank": 8}
    report = compress(source, out, method=method, **options.get(family, {}))
    assert report.method == method
    formats = {"grid": "pack-quantized", "low_rank": "low-rank", "microscaled": "mxfp4-pack-quantized"}
    assert report.format == formats.get(family if own else "", "dense")
    assert not [note for note in report.notes if "did not reach" in note]
    before, after = dense_tensors(source), dense_tensors(out)
    rewritten = COMPRESSING[method].rewrite is not None
    assert rewritten or before.keys() == after.keys()
    for name in LAYERS:
        weight, changed = before[f"{name}.weight"], after[f"{name}.weight"]
        if family == "sparse":
            assert (changed == 0).sum() == round(0.5 * weight.numel())
        if method == "wanda":
            assert ((changed == 0).sum(1) == round(0.5 * weight.shape[1])).all()
        if method == "magnitude":
            kept = changed != 0
            assert weight[kept].abs().min() >= weight[~kept].abs().max()
        if method in ("magnitude", "wanda", "obd"):
            assert torch.equal(changed[changed != 0], weight[changed != 0])
        if family == "low_rank":
            assert torch.linalg.matrix_rank(changed.double(), rtol=1e-5) == 24
        if family == "grid" and own:
            for row in changed.view(-1, 32)[:8]:
                assert len(row.unique()) <= 16
        if method == "squeezellm":
            few = sorted(len(row.unique()) for row in changed)
            assert few[len(few) // 2] <= 17  # 16 values, and one weight in 200 that stays as it is
    for name in set() if rewritten else before.keys() - {f"{name}.weight" for name in LAYERS}:
        assert torch.equal(before[name], after[name])
    if family == "low_rank":
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
        dense = tiny_models.load("llama", twin(out, tmp_path / "twin", source), dtype=torch.float32)
        torch.testing.assert_close(output(loaded), output(dense), atol=1e-4, rtol=1e-4)
    else:
        dense = tiny_models.load("llama", twin(out, tmp_path / "twin", source))
        assert torch.equal(output(tiny_models.load("llama", out)), output(dense))


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("scope", ["global", "lamp"])
def test_a_share_of_all_layers_together(method: str, scope: str, half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    compress(source, out, method=method, sparsity=0.6, scope=scope, ignore=("layers.1.*",))
    before, after = dense_tensors(source), dense_tensors(out)
    pruned = [name for name in LAYERS if "layers.0." in name]
    zeros = {name: int((after[f"{name}.weight"] == 0).sum()) for name in pruned}
    total = sum(before[f"{name}.weight"].numel() for name in pruned)
    assert sum(zeros.values()) == round(0.6 * total)
    assert len({zeros[name] / before[f"{name}.weight"].numel() for name in pruned}) > 1
    assert all(bool((after[f"{name}.weight"] != 0).any()) for name in LAYERS if name not in pruned)
    if (method, scope) == ("magnitude", "global"):
        dropped = torch.cat([before[f"{n}.weight"][after[f"{n}.weight"] == 0].abs() for n in pruned])
        kept = torch.cat([before[f"{n}.weight"][after[f"{n}.weight"] != 0].abs() for n in pruned])
        assert dropped.max() <= kept.min()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_two_of_four(method: str, half_folder: FolderOf, tmp_path: Path) -> None:
    compress(half_folder("llama"), tmp_path / "out", method=method, sparsity="2:4")
    after = load_file(tmp_path / "out" / WEIGHTS)
    for name in LAYERS:
        assert ((after[f"{name}.weight"].view(-1, 4) != 0).sum(1) == 2).all()


def test_two_of_four_and_four_bits_at_once(half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    report = compress(source, out, method="sparsegpt", sparsity="2:4", bits=4, group_size=32)
    assert report.format == "pack-quantized"
    for name, tensor in dense_tensors(out).items():
        if name.removesuffix(".weight") in LAYERS:
            assert ((tensor.view(-1, 4) != 0).sum(1) <= 2).all()
            assert all(len(row.unique()) <= 16 for row in tensor.view(-1, 32)[:8])
            assert (tensor == 0).float().mean() < 0.75
    dense = tiny_models.load("llama", twin(out, tmp_path / "twin", source))
    assert torch.equal(output(tiny_models.load("llama", out)), output(dense))


def test_wanda_is_wanda(family_folder: FolderOf, tmp_path: Path) -> None:
    """Layer after layer: in each row, the half of the weights with the smallest |W| · ‖x‖ are zero."""
    source, out = family_folder("llama"), tmp_path / "out"
    compress(source, out, method="wanda", sparsity=0.5)
    after = load_file(out / WEIGHTS)
    model = tiny_models.load("llama", source)
    groups = [[n for n in LAYERS if n.startswith(f"{at}.")] for at in IN_ORDER]
    stages = [part for g in groups for part in (g[:-1], g[-1:])]  # those that share an input, then the last
    for stage in stages:
        seen: list[Tensor] = []
        hook = model.get_submodule(stage[0]).register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        output(model, IDS)
        hook.remove()
        norm = seen[0].flatten(0, 1).double().square().sum(0).sqrt()
        for name in stage:
            weight = model.get_submodule(name).weight
            score = weight.data.double().abs() * norm
            threshold = score.sort(1).values[:, [weight.shape[1] // 2]]
            weight.data[score < threshold] = 0
            assert torch.equal(after[f"{name}.weight"], weight.data), name


def test_gptq_costs_less_than_rounding(half_folder: FolderOf, tmp_path: Path) -> None:
    kl = {}
    for method in ("rtn", "gptq"):
        report = compress(half_folder("llama"), tmp_path / method, method=method, bits=3, group_size=32)
        kl[method] = hesse.evaluate(tmp_path / method, reference=half_folder("llama"), data=OTHER_IDS).report.kl
        assert 1 / 3 < report.loss.predicted / kl[method] < 3
    assert kl["gptq"] < 0.9 * kl["rtn"]


def test_batch_size_changes_memory_and_not_the_result(family_folder: FolderOf, tmp_path: Path) -> None:
    found, predicted = [], []
    for size in (1, 3, 8):
        out, options = tmp_path / f"out-{size}", {"method": "gptq", "bits": 4, "group_size": 32}
        report = compress(family_folder("llama"), out, batch_size=size, **options)
        found.append(dense_tensors(tmp_path / f"out-{size}"))
        predicted.append(report.loss.predicted)
    for other in found[1:]:
        different = sum(int((other[name] != found[0][name]).sum()) for name in other)
        assert different < 0.005 * sum(tensor.numel() for tensor in other.values())
    assert predicted == pytest.approx([predicted[0]] * 3, rel=0.01)


def test_the_same_seed_gives_the_same_bytes(family_folder: FolderOf, tmp_path: Path) -> None:
    reports = [compress(family_folder("llama"), tmp_path / name, bits=4, group_size=32, seed=3) for name in "ab"]
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    assert reports[0].loss.predicted == reports[1].loss.predicted
    assert reports[0].calibration["fingerprint"] == reports[1].calibration["fingerprint"]


def test_tied_weights_stay_tied(half_folder: FolderOf, tmp_path: Path) -> None:
    compress(half_folder("llama-tied"), tmp_path / "out", bits=4, group_size=32)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").names()
    model = tiny_models.load("llama-tied", tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(
        model.lm_head.weight, load_file(half_folder("llama-tied") / WEIGHTS)["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_ignored_layers_are_left_as_they_are(name: str, half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder(name), tmp_path / "out"
    pattern = "down_proj" if name == "llama" else "experts.*"
    report = compress(source, out, bits=4, group_size=32, ignore=(pattern, "layers.1.self_attn.q_proj"))
    before, after = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    ignored = [n for n in before if "down_proj" in n or ".experts." in n or "layers.1.self_attn.q_proj" in n]
    assert len(ignored) == (3 if name == "llama" else 25)
    for tensor in ignored:
        assert before[tensor].dtype == after[tensor].dtype
        assert torch.equal(before[tensor], after[tensor])
    assert all(layer.tokens == 256 for layer in report.layers)
    assert not {layer.name for layer in report.layers} & {n.removesuffix(".weight") for n in ignored}
    dense = tiny_models.load(name, twin(out, tmp_path / "twin", source))
    assert torch.equal(output(tiny_models.load(name, out)), output(dense))


def test_a_recipe_gives_each_layer_its_own_rule(half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    rules = (
        Rule(
            layers=("mlp.*",),
            curvature="identity",
            constraint=ConstraintOptions(grid=GridOptions(bits=8, group_size=-1)),
            solver=SolverOptions(name="nearest"),
        ),
        Rule(
            curvature="gram",
            constraint=ConstraintOptions(grid=GridOptions(bits=3, group_size=32)),
            solver=SolverOptions(name="error_feedback", damping=0.05),
        ),
    )
    report = compress(source, out, recipe=Recipe(rules=rules, ignore=("layers.0.self_attn.o_proj",)))
    assert len(report.layers) == 13
    for layer in report.layers:
        inner = ".mlp." in layer.name
        assert layer.method == ("Identity × Grid × Nearest" if inner else "Gram × Grid × ErrorFeedback")
        assert (8 if inner else 3) < layer.bits_per_weight < (9 if inner else 4.2)
        assert layer.damping == (0 if inner else 0.05)
        assert layer.tokens == 256  # those of the ignored layer before it are not among them
    assert Recipe.model_validate(report.recipe) == Recipe(rules=rules, ignore=("layers.0.self_attn.o_proj",))
    dense = tiny_models.load("llama", twin(out, tmp_path / "twin", source))
    assert torch.equal(output(tiny_models.load("llama", out)), output(dense))


def test_the_report_beside_the_weights_is_the_report(half_folder: FolderOf, tmp_path: Path) -> None:
    report = compress(half_folder("llama"), tmp_path / "out", bits=4, group_size=32)
    written = json.loads((tmp_path / "out" / "hesse-report.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(report.to_dict()))
    phases = {"total", "read", "probe", "calibrate", "estimate", "solve", "predict", "write", "verify"}
    assert report.seconds.keys() == phases
    assert all(value > 0 for value in report.seconds.values())
    parts = sum(value for phase, value in report.seconds.items() if phase != "total")
    assert 0.5 * report.seconds["total"] < parts <= report.seconds["total"]
    assert report.peak_rss_bytes > 1e8
    stored = [layer.bits_per_weight * layer.shape[0] * layer.shape[1] / 8 for layer in report.layers]
    sizes = load_file(tmp_path / "out" / WEIGHTS)
    packed = sum(tensor.nbytes for name, tensor in sizes.items() if name.rpartition(".")[0] in LAYERS)
    assert sum(stored) == pytest.approx(packed)


def test_several_shards_and_an_index(half_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    monkeypatch.setattr(writer, "SHARD_BYTES", 30_000)
    compress(source, out, bits=4, group_size=32)
    shards = set(json.loads((out / INDEX).read_text())["weight_map"].values())
    assert shards == {path.name for path in out.glob("*.safetensors")}
    assert len(shards) > 1
    dense = tiny_models.load("llama", twin(out, tmp_path / "twin", source))
    assert torch.equal(output(tiny_models.load("llama", out)), output(dense))


def test_one_block_at_most_is_in_memory(half_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all networks of a run, parameters of one block at most are off the meta device, whatever is looked at."""
    networks: list[CheckpointNetwork] = []
    most = 0
    build, load, surround = CheckpointNetwork.__init__, CheckpointNetwork.loaded, CheckpointNetwork.surroundings

    def count() -> None:
        nonlocal most
        blocks = [block.module for network in networks for block in network.blocks]
        most = max(most, sum(not all(p.is_meta for p in block.parameters()) for block in blocks))

    def built(self: CheckpointNetwork, *arguments: object) -> None:
        build(self, *arguments)  # type: ignore[arg-type]
        networks.append(self)

    @contextmanager
    def loaded(self: CheckpointNetwork, block: Block) -> Iterator[nn.Module]:
        with load(self, block) as module:
            count()
            yield module
            count()

    @contextmanager
    def surroundings(self: CheckpointNetwork) -> Iterator[nn.Module]:
        with surround(self) as model:
            count()
            yield model

    monkeypatch.setattr(CheckpointNetwork, "__init__", built)
    monkeypatch.setattr(CheckpointNetwork, "loaded", loaded)
    monkeypatch.setattr(CheckpointNetwork, "surroundings", surroundings)
    compress(half_folder("llama"), tmp_path / "out", bits=4, group_size=32)
    assert len(networks) == 2  # dense and written
    assert most == 1
    assert all(parameter.is_meta for network in networks for parameter in network.model.parameters())


def test_experts_that_no_token_reaches_are_rounded_to_nearest(tmp_path: Path) -> None:
    source, out = tiny_models.save("qwen3-moe", tmp_path / "dense", torch.bfloat16), tmp_path / "out"

    def silence(tensors: dict[str, Tensor]) -> None:
        # Of a, -a, b and -b two are above 0, so that experts 4 and 5 are never among the best two.
        for block in range(2):
            router = tensors[f"model.layers.{block}.mlp.gate.weight"]
            router[1], router[3], router[4:] = -router[0], -router[2], 0

    before = dense_tensors(change(source, silence))
    report = compress(source, out, bits=4, group_size=32)
    after = dense_tensors(out)
    layers = {layer.name: layer for layer in report.layers}
    nearest = hesse.Grid(4, 32, headroom=1.0, signed=True).stored_as(torch.bfloat16)
    silent = [name for name in layers if ".experts.4." in name or ".experts.5." in name]
    assert len(silent) == 12
    for name in silent:
        assert any(note.startswith(f"{name}: saw no calibration tokens") for note in report.notes)
        assert layers[name].tokens == 0
        assert layers[name].predicted_loss_increase is None
        expected = nearest.decode(nearest.encode(before[f"{name}.weight"].float()))
        assert torch.equal(after[f"{name}.weight"].float(), expected)
    assert sum("saw no calibration tokens" in note for note in report.notes) == 12
    assert all(layer.tokens > 0 for name, layer in layers.items() if name not in silent)


def test_dead_inputs_are_listed_and_their_weights_kept(tmp_path: Path) -> None:
    source, out = tiny_models.save("llama", tmp_path / "dense"), tmp_path / "out"

    def deaden(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][7] = 0

    before = dense_tensors(change(source, deaden))
    report = compress(source, out, method="gptq", bits=4, group_size=32)
    after = dense_tensors(out)
    expected = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}
    dead = {note.split(":")[0] for note in report.notes if "1 of 64 inputs are always zero on this data" in note}
    assert dead == expected
    nearest = hesse.Grid(4, 32, headroom=0.25)
    for name in expected:
        weight, changed = before[f"{name}.weight"], after[f"{name}.weight"]
        half_a_step = nearest.expand(nearest.fit(weight).scale, 64)[:, 7] / 2
        # The largest weights of a group are clipped by the headroom: 7.625 steps to 7.
        assert ((changed - weight)[:, 7].abs() <= 1.26 * half_a_step).all()
        assert (changed[:, 7] != 0).float().mean() > 0.7


def test_a_gram_that_cannot_be_factorised_is_listed(family_folder: FolderOf, tmp_path: Path) -> None:
    report = compress(
        family_folder("llama"), tmp_path / "out", bits=4, group_size=32, damping=0.0, data=[[9, 10, 9, 10, 9, 10]]
    )
    raised = [layer for layer in report.layers if layer.damping > 0]
    assert raised
    for layer in raised:
        notes = [note for note in report.notes if note.startswith(f"{layer.name}: the Gram could not be factorised")]
        assert notes[-1].endswith(f"damping was raised to {layer.damping:g}")
    assert any("saw 6 tokens for 64 inputs" in note for note in report.notes)


def corrupt(monkeypatch: pytest.MonkeyPatch, name: str, edit: Callable[[Tensor], Tensor]) -> None:
    """Let the disk change one tensor on its way."""
    write_tensors = writer.write_tensors

    def changed(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
        edited = {key: edit(tensor) if key == name else tensor for key, tensor in tensors.items()}
        write_tensors(path, edited, header)

    monkeypatch.setattr(writer, "write_tensors", changed)


def flip_first_bit(words: Tensor) -> Tensor:
    flipped = words.clone()
    flipped.view(-1)[0] ^= 1
    return flipped


def test_a_flipped_bit_keeps_the_checkpoint_from_its_name(
    half_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, "model.layers.1.mlp.up_proj.weight_packed", flip_first_bit)
    with pytest.raises(VerificationError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight_packed reads back different"):
        compress(half_folder("llama"), tmp_path / "out", bits=4, group_size=32)
    assert left_over(tmp_path) == []


def test_a_layer_that_is_not_stored_as_it_was_solved_is_named(
    half_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, "model.layers.1.mlp.up_proj.weight_packed", flip_first_bit)
    monkeypatch.setattr(job, "check_assembled", lambda *_: None)
    with pytest.raises(VerificationError, match=r"^model\.layers\.1\.mlp\.up_proj reads back different"):
        compress(half_folder("llama"), tmp_path / "out", bits=4, group_size=32)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_a_copied_tensor_that_changed_is_named(
    name: str, half_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, name, lambda tensor: tensor + 1)
    with pytest.raises(VerificationError, match=name):
        compress(half_folder("qwen2"), tmp_path / "out", bits=4, group_size=32)
    assert left_over(tmp_path) == []


def test_a_cost_out_of_all_proportion_is_refused(
    half_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solved_layer, "effect", lambda *_: Effect(1.0, 1e-9))
    with pytest.raises(
        VerificationError, match=r"nats per token, against .* predicted.*model\.layers\.\d\.\w+\.\w_proj"
    ):
        compress(half_folder("llama"), tmp_path / "out", bits=2, group_size=64)
    assert left_over(tmp_path) == []


def test_samples_longer_than_the_model_takes_are_cut_and_listed(half_folder: FolderOf, tmp_path: Path) -> None:
    """Text is cut to the positions there are; the run says so."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i % 26) for i in range(9000)))
    source = tmp_path / "model"
    shutil.copytree(half_folder("llama"), source)
    tokenizer = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(26)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    report = hesse.compress(source, tmp_path / "out", data=text, samples=4, length=2048).report
    assert report.calibration["length"] == 128
    assert "samples have 128 tokens, not 2048: the model has no more positions" in report.notes


def test_the_report_says_which_share_of_the_linear_weights_is_compressed(half_folder: FolderOf, tmp_path: Path) -> None:
    whole = compress(half_folder("llama"), tmp_path / "whole", method="rtn", bits=4, group_size=32)
    part = compress(half_folder("llama"), tmp_path / "part", method="rtn", bits=4, group_size=32, ignore=["*.mlp.*"])
    weights = {name: rows * columns for name, (rows, columns) in ((x.name, x.shape) for x in whole.layers)}
    assert whole.compressed_share == 1
    kept = sum(count for name, count in weights.items() if ".mlp." not in name)
    assert part.compressed_share == pytest.approx(kept / sum(weights.values()))
