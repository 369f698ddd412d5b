"""Rewritings: the function stays, what they are made of is orthogonal, and what stood out does so less."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hesse
import tiny_models
from helpers import (
    IDS,
    OTHER_IDS,
    CommandLine,
    change,
    compress,
    compress_module,
    dense_tensors,
    left_over,
    output,
    twin,
    write_ids,
)
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.constraints import Grid
from hesse.errors import DataError, OptionError, UnsupportedModelError
from hesse.formats import open_checkpoint
from hesse.methods.recipe import Rewrite
from hesse.networks.network import CheckpointNetwork
from hesse.passes.stream import advance, finish, start
from hesse.rewriting import ROTATIONS, SCALINGS, Rewriting, RewritingSamples, RoundingTarget
from hesse.rewriting.hadamard import random_hadamard
from hesse.rewriting.kurtosis import UNIFORM, kurtosis, learn_rotation
from hesse.rewriting.maps import FeatureMap, Folding, Rotation, Scaling
from hesse.rewriting.scales import FeatureSizes, activation_aware, outlier_smoothing, smoothing
from hesse.rewriting.stream_inputs import stream_inputs
from hesse.rewriting.streams import FAMILIES

FolderOf = Callable[[str], Path]
CPU = torch.device("cpu")
SAMPLES = torch.tensor(OTHER_IDS)
ROTATED = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
# Families and settings that the shared table has not.
OTHERS: dict[str, tuple[str, str, dict[str, object]]] = {
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**tiny_models.GROUPED, "head_dim": 16}),
    "llama-biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**tiny_models.GROUPED, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-odd": ("LlamaForCausalLM", "LlamaConfig", {**tiny_models.GROUPED, "hidden_size": 60, "head_dim": 20}),
}


# What no rotation reaches: norms inside heads, and biases that only heads or products of features see.
UNTURNED = ("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias")


@pytest.fixture(scope="module")
def folder_of(family_folder: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """As `family_folder`, of `OTHERS` too."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in OTHERS:
            return family_folder(name)
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiny_models.FAMILIES, name, OTHERS[name])
                made[name] = tiny_models.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def logits(checkpoint: Checkpoint) -> Tensor:
    """What a checkpoint predicts, computed in float64."""
    network = CheckpointNetwork(checkpoint, torch.float64, CPU)
    flows = start(network, [SAMPLES])
    for index, block in enumerate(network.blocks):
        with network.loaded(block) as module:
            advance(flows, module, index)
    with network.surroundings() as model, torch.no_grad():
        return finish(network, model, flows[0])


def rewritten(kind: str, folder: Path, targets: dict[str, RoundingTarget] | None = None, seed: int = 0) -> Rewriting:
    rewriting = Rewriting(kind, CheckpointNetwork(Checkpoint(folder), torch.float32, CPU))
    rewriting.find(RewritingSamples([torch.tensor(IDS)], targets or {}, seed, None, lambda: None))
    return rewriting


LEARNED = ("llama-tied", "gemma", "llama-odd")  # the others differ from these in nothing that is learned
FAMILY_KINDS = [*((name, "hadamard") for name in (*ROTATED, *OTHERS)), *((name, "kurtail") for name in LEARNED)]


@pytest.mark.parametrize(("name", "kind"), FAMILY_KINDS)
def test_the_function_stays(name: str, kind: str, folder_of: FolderOf) -> None:
    folder = folder_of(name)
    rewriting = rewritten(kind, folder)
    before, after = logits(Checkpoint(folder)), logits(rewriting.checkpoint)
    assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max())  # norms compute in float32
    turned = rewriting.checkpoint.read(rewriting.checkpoint.names())
    stored = Checkpoint(folder).read(Checkpoint(folder).names())
    same = {tensor for tensor in stored if torch.allclose(turned[tensor], stored[tensor], atol=1e-3)}
    assert same == {tensor for tensor in stored if tensor.endswith(UNTURNED)}


REFUSED = [(name, kind) for name in ("gpt2", "phi3", "mixtral", "bert") for kind in get_args(Rewrite)]


@pytest.mark.parametrize(("name", "kind"), [*REFUSED, *((name, "hadamard") for name in ("gemma2", "gemma3"))])
def test_other_families_are_refused_by_name(name: str, kind: str, family_folder: FolderOf) -> None:
    network = CheckpointNetwork(Checkpoint(family_folder(name)), torch.float32, CPU)
    with pytest.raises(
        UnsupportedModelError, match=rf"{type(network.model).__name__} .*(knows llama, mistral|forbid rotations)"
    ):
        Rewriting(kind, network)


@given(size=st.integers(1, 96), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_random_hadamard_matrices_are_orthogonal(size: int, seed: int) -> None:
    matrix = random_hadamard(size, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    if size & (size - 1) == 0:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5), atol=1e-12, rtol=0)


@given(
    kind=st.sampled_from((Scaling, Folding, Rotation)),
    heads=st.integers(1, 3),
    repeats=st.integers(1, 3),
    size=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_maps_cancel_between_layers(kind: type[FeatureMap], heads: int, repeats: int, size: int, seed: int) -> None:
    """B repeat(A x) is the same after the map, with A's outputs repeated head by head as grouped attention does."""
    generator = torch.Generator().manual_seed(seed)
    features = heads * size
    first, second = (
        torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in ((features, 4), (3, features * repeats))
    )
    values = 0.5 + torch.rand(heads, size, generator=generator, dtype=torch.float64)
    if kind is Rotation:
        values = torch.stack([random_hadamard(size, generator) for _ in range(heads)])
    if kind is Folding:  # of scales that the first layer applies
        first = values.view(-1, 1)
    map = kind(values)

    def repeated(outputs: Tensor) -> Tensor:
        return outputs.view(heads, 1, size, -1).expand(-1, repeats, -1, -1).reshape(features * repeats, -1)

    torch.testing.assert_close(map.on_inputs(second) @ repeated(map.on_outputs(first)), second @ repeated(first))


def test_folding_takes_in_scales_of_zero() -> None:
    assert torch.equal(Folding(torch.tensor([[2.0, 0.0]])).on_inputs(torch.ones(1, 2)), torch.tensor([[2.0, 0.0]]))


def test_a_learned_rotation_finds_what_was_turned() -> None:
    """Uniform inputs, turned at random, come back to the kurtosis of a uniform; the path is the same each time."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(600, 8, generator=generator, dtype=torch.float64) - 0.5
    turned = inputs @ random_hadamard(8, generator).T
    start = random_hadamard(8, generator)
    found = learn_rotation(turned, start)
    torch.testing.assert_close(found @ found.T, torch.eye(8, dtype=torch.float64), atol=1e-10, rtol=0)
    away = [float((kurtosis(turned @ r.T) - UNIFORM).abs().mean()) for r in (start, found)]
    assert away[1] < 0.5 * away[0]
    assert torch.equal(found, learn_rotation(turned, start))
    assert torch.equal(learn_rotation(torch.zeros(5, 8), start), start)


@pytest.mark.parametrize("seed", range(3))
def test_learning_never_ends_worse_than_it_began(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(100, 6, generator=generator).double() ** 3
    start = random_hadamard(6, generator)
    losses = [
        float((kurtosis(inputs @ learn_rotation(inputs, start, steps).T) - UNIFORM).abs().mean())
        for steps in (0, 1, 5, 40)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_kurtosis_is_the_fourth_moment_over_the_squared_second() -> None:
    assert kurtosis(torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 2.0]])).tolist() == [1.0, 4.0]
    assert float(kurtosis(torch.linspace(-1, 1, 100001)[None])) == pytest.approx(UNIFORM, abs=1e-3)


def plant(folder: Path, out: Path, channels: tuple[int, ...], size: float) -> Path:
    """The same function with `channels` of the residual `size` times as large as they were to each norm's readers."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("layernorm.weight"):
                tensors[name][list(channels)] *= size
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                tensors[name][:, list(channels)] /= size

    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).write_bytes((folder / name).read_bytes())
    return change(out, edit)


def input_kurtosis(checkpoint: Checkpoint, rewriting: Rewriting) -> float:
    """The mean over layers behind norms, and over tokens."""
    network = CheckpointNetwork(checkpoint, torch.float32, CPU)
    flows = start(network, [torch.tensor(IDS)])
    found = [
        kurtosis(inputs[stream.name].sampled).mean()
        for _, block, inputs in stream_inputs(network, rewriting.streams, flows, every=1)
        for stream in (block.attention, block.feedforward)
    ]
    return float(torch.stack(found).mean())


def test_outliers_are_spread_and_learning_spreads_them_further(family_folder: FolderOf, tmp_path: Path) -> None:
    folder = plant(family_folder("llama"), tmp_path / "planted", (3, 40), 30.0)
    torch.testing.assert_close(
        logits(Checkpoint(folder)), logits(Checkpoint(family_folder("llama"))), atol=1e-4, rtol=0
    )
    hadamard, learned = (rewritten(kind, folder) for kind in ROTATIONS)
    found = [input_kurtosis(c, hadamard) for c in (Checkpoint(folder), hadamard.checkpoint, learned.checkpoint)]
    assert found[0] > 20
    assert found[1] < 4
    assert found[2] < 0.95 * found[1]


@pytest.mark.parametrize(("name", "kind"), [("llama-tied", "kurtail"), ("qwen3", "hadamard")])
def test_rotated_models_load(name: str, kind: str, family_folder: FolderOf, tmp_path: Path) -> None:
    source, out = family_folder(name), tmp_path / "out"
    report = hesse.rotate(source, out, kind=kind, data=IDS).report
    assert abs(report.loss.measured) < 1e-7
    assert ("head" in "".join(report.notes)) == (name == "llama-tied")
    model = tiny_models.load(name, out)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(output(model), output(tiny_models.load(name, source)), atol=2e-5, rtol=0)
    assert not (out / "waiting").exists()
    expected = rewritten(kind, source).checkpoint
    written = Checkpoint(out)
    assert set(written.names()) == set(expected.names())
    for tensor, value in expected.read(expected.names()).items():
        assert torch.equal(value, written.read([tensor])[tensor])


def test_the_command_says_what_it_wrote(family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path) -> None:
    ids = write_ids(tmp_path / "ids.jsonl")
    arguments = ("rotate", family_folder("llama"), tmp_path / "out", "--data", ids)
    ran = hesse_command(*arguments)
    assert ran.code == 0
    assert "KL(dense || rotated)" in ran.stdout
    assert json.loads(hesse_command(*arguments, "--overwrite", "--json").stdout)["kind"] == "hadamard"
    refused = hesse_command("rotate", family_folder("llama"), tmp_path / "other", "--kind", "quip")
    assert "there is no rotation 'quip'; there are hadamard, kurtail" in refused.error
    refused = hesse_command("rotate", family_folder("gpt2"), tmp_path / "other", "--data", ids)
    assert "GPT2LMHeadModel is of a family that Hesse does not rewrite" in refused.error
    assert not left_over(tmp_path, "other")


@pytest.mark.parametrize("method", ["quarot", "kurtail"])
def test_a_method_rounds_what_it_rewrote(method: str, half_folder: FolderOf, tmp_path: Path) -> None:
    """As rotating first and rounding then; transformers loads it; what it is compared with is the model on disk."""
    source, out, rotated = half_folder("llama-tied"), tmp_path / "out", tmp_path / "rotated"
    report = compress(source, out, method=method, bits=4, group_size=32)
    assert report.recipe["rewrite"] == hesse.methods.METHODS[method].rewrite
    hesse.rotate(source, rotated, kind=str(hesse.methods.METHODS[method].rewrite), data=IDS)
    compress(rotated, tmp_path / "two-steps", method="gptq", bits=4, group_size=32)
    ours, two_steps = dense_tensors(out), dense_tensors(tmp_path / "two-steps")
    assert ours.keys() == two_steps.keys()
    assert all(torch.equal(ours[name], two_steps[name]) for name in ours)
    dense = tiny_models.load("llama-tied", twin(out, tmp_path / "twin", rotated))
    assert torch.equal(output(tiny_models.load("llama-tied", out)), output(dense))
    kl = hesse.evaluate(out, reference=source, data=IDS).report.kl
    assert report.loss.measured == pytest.approx(kl, rel=0.5)
    if method == "quarot":
        assert report.bytes_before == open_checkpoint(source).file_bytes


def test_what_does_not_go_together_is_refused(family_folder: FolderOf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hesse.estimate(family_folder("llama"), tmp_path / "stats", data=write_ids(tmp_path / "ids.jsonl"))
    with pytest.raises(OptionError, match=r"--statistics is of .* before it is rewritten"):
        compress(family_folder("llama"), out, method="quarot", statistics=tmp_path / "stats", data=None)
    with pytest.raises(OptionError, match="a budget is planned on a model as it is, and kurtail rewrites it"):
        compress(family_folder("llama"), out, method="kurtail", mean_bits=3.5)
    with pytest.raises(OptionError, match="hadamard rewrites language models on disk, not modules"):
        compress_module(torch.nn.Sequential(torch.nn.Linear(4, 4)), [], method="quarot")
    with pytest.raises(UnsupportedModelError, match="does not rewrite"):
        compress(family_folder("gpt2"), out, method="quarot")
    assert not left_over(tmp_path)


def test_what_a_type_cannot_hold_is_refused(family_folder: FolderOf, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half()
        tensors["model.norm.weight"] *= 60000
        tensors["lm_head.weight"] *= 1000

    folder = plant(family_folder("llama"), tmp_path / "planted", (), 1.0)
    change(folder, edit)
    with pytest.raises(DataError, match=r"lm_head.weight holds NaN or infinity after rewriting in torch.float16"):
        logits(rewritten("hadamard", folder).checkpoint)


def targets_of(folder: Path, bits: int, input_bits: int | None) -> dict[str, RoundingTarget]:
    """Everything to so many bits, in groups of 16 or by whole rows where inputs are rounded too."""
    layers = CheckpointNetwork(Checkpoint(folder), torch.float32, CPU).layers
    return {layer.name: RoundingTarget(Grid(bits, 16 if input_bits is None else -1), input_bits) for layer in layers}


SCALED = [("llama-tied", "smoothing"), ("gemma2", "smoothing"), ("gemma3", "outlier_smoothing")]


@pytest.mark.parametrize(("name", "kind"), [*SCALED, *zip(OTHERS, SCALINGS, strict=True)])
def test_the_function_stays_with_scales(name: str, kind: str, folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of(name)
    rewriting = rewritten(kind, folder, targets_of(folder, 4, 4))
    assert rewriting.checkpoint.changes
    before, after = logits(Checkpoint(folder)), logits(rewriting.checkpoint)
    assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max())
    assert rewriting.checkpoint.config == Checkpoint(folder).config
    rewriting.save(tmp_path / "found")
    again = Rewriting(kind, rewriting.network)
    again.load(tmp_path / "found")
    for tensor in again.checkpoint.names():
        assert torch.equal(again.checkpoint.read([tensor])[tensor], rewriting.checkpoint.read([tensor])[tensor])


def test_candidates_are_those_of_the_papers() -> None:
    sizes = FeatureSizes(
        torch.tensor([[1.0, 4.0, 16.0]]), torch.tensor([[1.0, 4.0, 16.0]]), torch.tensor([[2.0, 1.0, 0.5]])
    )
    aware, smooth, outliers = (list(kind(sizes)) for kind in (activation_aware, smoothing, outlier_smoothing))

    def like(found: Tensor, wanted: list[float]) -> bool:
        return torch.allclose(found / found[0, 0], torch.tensor([wanted]) / wanted[0])

    assert like(aware[-1], [1, 1 / 2, 1 / 4])  # AWQ: the inputs' root mean square
    assert like(aware[9], [1, 2**-0.5, 1 / 2])  # and its square root
    assert like(smooth[-1], [1, 1 / 4, 1 / 16])  # all of the difficulty to the weights
    assert like(smooth[10], [2**0.5, 1 / 2, 2**-0.5 / 4])
    assert outliers[-1].tolist() == [[1.0, 1.0, 0.25]]  # what is above the median comes down to it
    assert all(float(scale.max()) == 1 for scale in outliers)


@pytest.mark.parametrize("kind", SCALINGS)
def test_no_stream_ends_with_more_error(kind: str, folder_of: FolderOf, tmp_path: Path) -> None:
    """On the tokens that scales were tried on, against the readers' outputs computed plainly."""
    folder = plant(folder_of("qwen3"), tmp_path / "planted", (3, 40), 30.0)
    targets = targets_of(folder, 4, 8)
    rewriting = rewritten(kind, folder, targets)
    errors: dict[str, list[float]] = {}
    for checkpoint in (Checkpoint(folder), rewriting.checkpoint):
        network = CheckpointNetwork(checkpoint, torch.float32, CPU)
        for block, streams, inputs in stream_inputs(
            network, rewriting.streams, start(network, [torch.tensor(IDS)]), every=1
        ):
            weights = {layer.name: layer.weight for layer in block.layers}
            for stream in streams.all:
                some, total = inputs[stream.name].sampled, 0.0
                for name in stream.layers:
                    rounded = Grid(8, -1).nearest(some) @ Grid(4, -1).nearest(weights[name]).T
                    total += float((rounded - some @ weights[name].T).square().sum())
                errors.setdefault(stream.name, []).append(total)
    assert all(after <= before * 1.001 for before, after in errors.values())
    behind_norms = [pair for name, pair in errors.items() if name.endswith(("attention", "feedforward"))]
    assert all(after < 0.3 * before for before, after in behind_norms)  # where the outliers are
    changed = {change.stream.name for change in rewriting.checkpoint.changes}
    assert {name for name, (before, after) in errors.items() if after < 0.999 * before} <= changed


def test_layers_that_are_left_alone_move_nothing(folder_of: FolderOf) -> None:
    folder = folder_of("llama")
    targets = targets_of(folder, 3, None)
    targets |= {name: RoundingTarget(None, None) for name in targets if not name.endswith("down_proj")}
    changes = rewritten("activation_aware", folder, targets).checkpoint.changes
    assert {change.stream.name.rpartition(".")[2] for change in changes} == {"inner"}


def test_scales_that_are_taken_in_help_as_those_beside(family_folder: FolderOf, tmp_path: Path) -> None:
    folder = plant(family_folder("llama"), tmp_path / "planted", (3, 40), 30.0)
    found = {
        method: compress(folder, tmp_path / method, method=method, bits=4, group_size=32)
        for method in ("rtn", "awq", "awq-dense")
    }
    measured = {method: report.loss.measured for method, report in found.items()}
    assert measured["awq"] < 0.6 * measured["rtn"]
    assert measured["awq"] < 1.3 * measured["awq-dense"]
    assert (found["awq"].format, found["awq-dense"].format) == ("pack-quantized", "dense")
    dense = tiny_models.load("llama", twin(tmp_path / "awq", tmp_path / "twin", folder))
    assert torch.equal(output(tiny_models.load("llama", tmp_path / "awq")), output(dense))


SMOOTHED = [("rtn", "smoothquant", {"bits": 8, "group_size": -1}), ("gptq", "qqq", {"bits": 4, "group_size": 32})]


@pytest.mark.parametrize(("plain", "smoothed", "options"), SMOOTHED)
def test_smoothing_takes_outliers_away(
    plain: str, smoothed: str, options: dict[str, Any], family_folder: FolderOf, tmp_path: Path
) -> None:
    folder = plant(family_folder("llama"), tmp_path / "planted", (3, 40), 30.0)
    measured = [
        compress(folder, tmp_path / method, method=method, input_bits=8, **options).loss.measured
        for method in (plain, smoothed)
    ]
    assert measured[1] < 0.5 * measured[0]


def test_recipes_know_what_there_is(tmp_path: Path) -> None:
    assert {*ROTATIONS, *SCALINGS} == set(get_args(Rewrite))
    assert set(FAMILIES) < set(transformers.CONFIG_MAPPING)
    file = tmp_path / "recipe.yaml"
    file.write_text(hesse.methods.METHODS["quarot"].recipe(hesse.Options()).to_yaml().replace("hadamard", "turn"))
    with pytest.raises(OptionError, match="rewrite: input should be 'hadamard'"):
        hesse.methods.load_recipe(file)
