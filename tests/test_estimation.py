"""What calibration data is summed up to, against plain sums and plain autograd."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from hesse.curvature import Gram
from hesse.curvature.losses import sampled_labels
from hesse.errors import DataError
from hesse.estimation import GramAccumulator, output_sensitivities
from hesse.models.checkpoint import Checkpoint
from hesse.models.network import Network
from hesse.models.stream import advance, start

FolderOf = Callable[[str], Path]
CPU = torch.device("cpu")
IDS = torch.tensor(tiny_models.random_ids(4, 20, seed=3))
SEED = 5


@pytest.mark.parametrize("width", [1, 96, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_summed_over_batches(width: int, dtype: torch.dtype) -> None:
    batches = [torch.randn(2, n, width).to(dtype) for n in (3, 50, 1)]
    accumulator = GramAccumulator("layer", width, CPU)
    for batch in batches:
        accumulator.add(batch)
    found = accumulator.gram()
    expected = Gram.from_inputs(torch.cat([b.reshape(-1, width) for b in batches]).double())
    assert found.tokens == expected.tokens == 108
    torch.testing.assert_close(found.second_moment.double(), expected.second_moment, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.second_moment, found.second_moment.T)


def test_gram_of_infinite_inputs_names_the_layer() -> None:
    accumulator = GramAccumulator("blocks.3.up", 2, CPU)
    accumulator.add(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(DataError, match=r"blocks\.3\.up"):
        accumulator.gram()


def test_labels_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([2.0, -1.0, float("-inf"), 0.5, 1.0])
    labels = sampled_labels(logits.expand(20_000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(labels, minlength=5) / len(labels)
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.012, rtol=0)  # 3.5 standard errors
    assert shares[2] == 0


def streamed(folder: Path, batch: int) -> tuple[Network, dict[str, Tensor]]:
    """The network, and E[g²] of its layers' outputs by the walk over blocks."""
    network = Network(Checkpoint(folder), torch.float32, CPU)
    flows = start(network, IDS.split(batch))
    inputs = []
    for index, block in enumerate(network.blocks):
        inputs.append([flow.hidden for flow in flows])
        with network.loaded(block) as module:
            advance(flows, module, index)
    return network, output_sensitivities(network, flows, inputs, SEED, lambda: None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "gpt-neox", "bert"])
def test_sensitivities_are_the_true_fisher_of_each_sample(name: str, family_folder: FolderOf) -> None:
    """One sample at a time through plain transformers: a mini-batch's mean gradient squared would not pass."""
    network, found = streamed(family_folder(name), batch=2)
    model = tiny_models.load(name, family_folder(name))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    outputs: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        outputs[name] = output.detach().requires_grad_() if not output.requires_grad else output
        outputs[name].retain_grad()
        return outputs[name]

    for layer in network.layers:
        model.get_submodule(layer.name).register_forward_hook(partial(watch, layer.name))
    encoder = name in tiny_models.ENCODERS
    samples = [IDS[i : i + 1] for i in range(len(IDS))]
    if encoder:  # noise is drawn for a batch of two at once
        shape = (2, IDS.shape[1], model.config.hidden_size)
        noise = torch.cat([torch.randn(shape, generator=generator) for _ in range(2)])
    else:
        with torch.no_grad():
            labels = sampled_labels(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), generator).view(len(IDS), -1)
    squares: dict[str, Tensor] = {}
    for i, sample in enumerate(samples):
        if encoder:
            loss = (model.base_model(input_ids=sample).last_hidden_state * noise[i]).sum()
        else:
            logits = model(input_ids=sample).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, labels[i], reduction="sum")
        loss.backward()
        for layer, output in outputs.items():
            squares[layer] = squares.get(layer, 0) + output.grad.flatten(0, -2).square().sum(0)
    count = IDS.numel() if encoder else IDS[:, 1:].numel()
    assert found.keys() == squares.keys() == {layer.name for layer in network.layers}
    for layer, square in squares.items():
        torch.testing.assert_close(found[layer], square / count, rtol=2e-3, atol=1e-6 * square.max() / count)


def test_sensitivities_do_not_depend_on_the_batches(family_folder: FolderOf) -> None:
    one, all_at_once = (streamed(family_folder("llama"), batch)[1] for batch in (1, 4))
    for name, square in one.items():
        torch.testing.assert_close(square, all_at_once[name], rtol=1e-3, atol=0)
