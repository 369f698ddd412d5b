"""Encoder-decoders: both halves are streamed, compressed, differentiated and resumed, and plain transformers agrees."""

import json
import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hesse
from helpers import kill_after
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.curvature import CrossEntropy
from hesse.curvature.objective import label_generator
from hesse.networks.network import CheckpointNetwork, each_loaded
from hesse.passes.backward import BackwardPass, layer_part
from hesse.passes.stream import advance, finish, start

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import zoo_models  # noqa: E402

SAMPLES = zoo_models.random_ids(6, 24)
IDS = torch.tensor(SAMPLES[:4])
TYPES = ("bart", "t5", "marian", "led", "fsmt", "mt5", "pegasus")
PROCESSES = multiprocessing.get_context("forkserver")

Built = Callable[[str], tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return a function that builds and saves the tiny model of a type."""
    known: dict[str, tuple[PreTrainedModel, Path]] = {}

    def build(name: str) -> tuple[PreTrainedModel, Path]:
        if name not in known:
            cls = zoo_models.model_class(zoo_models.groups()["seq2seq"][name])
            model = zoo_models.build(cls, zoo_models.shrink(name))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            known[name] = model, folder
        return known[name]

    return build


def plain(model: PreTrainedModel, ids: Tensor = IDS) -> Any:
    """Return what transformers makes of token ids that are to be predicted from themselves."""
    with torch.no_grad():
        return model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("name", TYPES)
def test_the_stream_predicts_what_transformers_does_with_labels(name: str, built: Built) -> None:
    model, folder = built(name)
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, torch.device("cpu"))
    flows = start(network, IDS.split(2))
    for index, block in each_loaded(network):
        advance(flows, block.module, index)
    with network.surroundings() as streamed, torch.no_grad():
        logits = torch.cat([finish(network, streamed, flow) for flow in flows])
    torch.testing.assert_close(logits, plain(model).logits, atol=1e-4, rtol=1e-4)
    assert all(parameter.is_meta for parameter in network.model.parameters())
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (".layers." in name or ".block." in name)
    ]
    assert len(network.layers) == len(linear)


def test_both_halves_are_compressed_and_the_loss_is_that_of_transformers(built: Built, tmp_path: Path) -> None:
    model, folder = built("bart")
    options = hesse.Options(bits=4, group_size=16)
    report = hesse.compress(folder, tmp_path / "out", method="gptq", options=options, data=SAMPLES, device="cpu").report
    names = {layer.name for layer in report.layers}
    for half in ("encoder", "decoder"):
        assert any(f".{half}.layers.1." in name for name in names)
    assert len([name for name in names if "encoder_attn" in name]) == 4 * model.config.decoder_layers
    compressed, info = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    dense, found = (plain(m, torch.tensor(SAMPLES)) for m in (model, compressed))
    logs = [result.logits.log_softmax(-1) for result in (dense, found)]
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    evaluated = hesse.evaluate(tmp_path / "out", reference=folder, data=SAMPLES, device="cpu").report
    assert evaluated.kl == pytest.approx(divergence, rel=1e-3)
    assert evaluated.model_loss == pytest.approx(float(found.loss), rel=1e-4)
    assert evaluated.reference_loss == pytest.approx(float(dense.loss), rel=1e-4)
    assert report.loss is not None
    assert report.loss.measured == pytest.approx(divergence, rel=1e-3)
    assert report.loss.predicted is not None
    assert 0.3 < report.loss.predicted / divergence < 3


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_gradients_reach_every_layer_of_both_halves_as_autograd_says(name: str, built: Built) -> None:
    model, folder = built(name)
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, torch.device("cpu"))
    flows, inputs = start(network, [IDS]), []
    for index, block in each_loaded(network):
        inputs.append([flow.waiting for flow in flows])
        advance(flows, block.module, index)
    found: dict[str, Tensor] = {}
    for block, recorded in BackwardPass(network, flows, inputs, seed=3):
        for batch in recorded:
            for layer in block.layers:
                rows = batch.rows(layer_part(layer))
                assert rows is not None
                found[layer.name] = (rows.gradients.flatten(0, 1).T @ rows.inputs.flatten(0, 1)).detach()
    logits = plain(model).logits
    labels = CrossEntropy().sample_targets(logits, IDS, label_generator(3))
    model.zero_grad()
    decoder_ids = model.prepare_decoder_input_ids_from_labels(labels=IDS)
    output = model(input_ids=IDS, decoder_input_ids=decoder_ids).logits
    CrossEntropy().terms(output.float(), labels).sum().backward()
    modules = dict(model.named_modules())
    assert found.keys() == {layer.name for layer in network.layers}
    for layer, gradient in found.items():
        torch.testing.assert_close(gradient, modules[layer].weight.grad, atol=1e-3, rtol=1e-3)


def compress_and_die(folder: Path, out: Path, die_after: int | None) -> None:
    """Compress, and kill this process once `die_after` steps are recorded."""
    torch.set_num_threads(1)
    kill_after(die_after)
    options = hesse.Options(bits=4, group_size=16)
    hesse.compress(folder, out, method="kronecker", options=options, data=SAMPLES, device="cpu")


def test_a_run_that_is_killed_in_either_half_goes_on_to_the_same_bytes(built: Built, tmp_path: Path) -> None:
    _, folder = built("bart")

    def run(out: str, die_after: int | None = None) -> int | None:
        process = PROCESSES.Process(target=compress_and_die, args=(folder, tmp_path / out, die_after))
        process.start()
        process.join()
        return process.exitcode

    assert run("whole") == 0
    for _ in range(40):  # a kill after every third step: in the dense pass, backward, and while blocks are solved
        if (ended := run("often", 3)) == 0:
            break
        assert ended == -signal.SIGKILL
    assert ended == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "often" / path.name).read_bytes() == path.read_bytes()
    reports = [json.loads((tmp_path / out / "hesse-report.json").read_text()) for out in ("whole", "often")]
    assert reports[0]["loss"] == reports[1]["loss"]
    assert reports[0]["layers"] == reports[1]["layers"]
