"""What calibration data is summed up to, against plain sums and plain autograd."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.curvature import BlockRankOneSum, CrossEntropy, Gram, Objective
from hesse.curvature.losses import next_tokens, sampled_labels
from hesse.errors import DataError, UnsupportedModelError
from hesse.estimation import GramAccumulator, OutputMoments, Sums, estimate_curvatures, sums
from hesse.estimation.probe import backward_statistics
from hesse.estimation.statistics.fisher import BLOCK_SIZE
from hesse.networks.network import CheckpointNetwork, Network
from hesse.passes.backward import BackwardPass, layer_part
from hesse.passes.stream import advance, start

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


@pytest.mark.parametrize("width", [5, 300])
def test_gram_of_16_bit_products(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU is asked for it, which multiplies 16-bit numbers exactly and sums in float32."""
    product, asked = torch.mm, []

    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        asked.append((left.dtype, right.dtype, out_dtype))
        return product(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(sums, "multiplies_exactly", lambda flat: flat.dtype == torch.bfloat16)
    test_gram_is_summed_over_batches(width, torch.bfloat16)
    assert set(asked) == {(torch.bfloat16, torch.bfloat16, torch.float32)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_of_16_bit_products_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = torch.randn(4096, 300).to(dtype)
    accumulator = GramAccumulator("layer", 300, torch.device("cuda"))
    accumulator.add(inputs.cuda())
    expected = Gram.from_inputs(inputs.double()).second_moment
    torch.testing.assert_close(accumulator.gram().second_moment.cpu().double(), expected, atol=1e-5, rtol=1e-5)


def test_gram_of_infinite_inputs_names_the_layer() -> None:
    accumulator = GramAccumulator("blocks.3.up", 2, CPU)
    accumulator.add(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(DataError, match=r"blocks\.3\.up"):
        accumulator.gram()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_moments_are_summed_over_batches(dtype: torch.dtype) -> None:
    batches = [(torch.randn(2, n, 96).to(dtype), torch.randn(2, n, 96).to(dtype)) for n in (3, 50, 1)]
    accumulator = GramAccumulator("layer", 96, CPU)
    for inputs, reference in batches:
        accumulator.add(inputs, reference)
    inputs, reference = (
        torch.cat([b.reshape(-1, 96) for b in stream]).double() for stream in zip(*batches, strict=True)
    )
    found = accumulator.gram().cross_moment
    assert found is not None
    torch.testing.assert_close(found.double(), inputs.T @ reference / len(inputs), atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="some inputs of layer came with a reference and some without"):
        accumulator.add(batches[0][0])


def test_labels_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([2.0, -1.0, float("-inf"), 0.5, 1.0])
    labels = sampled_labels(logits.expand(20_000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(labels, minlength=5) / len(labels)
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.012, rtol=0)  # 3.5 standard errors
    assert shares[2] == 0


def walked(folder: Path, batch: int, apart: bool = False) -> tuple[Network, BackwardPass]:
    """The network, and the walk back over its blocks."""
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, CPU)
    flows = start(network, IDS.split(batch))
    inputs = []
    for index, block in enumerate(network.blocks):
        inputs.append([flow.waiting for flow in flows])
        with network.loaded(block) as module:
            advance(flows, module, index)
    return network, BackwardPass(network, flows, inputs, SEED, apart)


def streamed(folder: Path, batch: int) -> tuple[Network, dict[str, Tensor]]:
    """The network, and E[g²] of its layers' outputs and E[(g xᵀ)²] of their weights by the walk over blocks."""
    network, walk = walked(folder, batch)
    needs = {layer.name: ("output diagonal", "fisher diagonal") for layer in network.layers}
    found = {layer: own for block in backward_statistics(walk, needs) for layer, own in block.items()}
    weights = {f"{layer}.weight": own["fisher diagonal"] for layer, own in found.items()}
    return network, {layer: own["output diagonal"] for layer, own in found.items()} | weights


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_of_the_fisher_are_those_of_each_sample(name: str, family_folder: FolderOf) -> None:
    network, walk = walked(family_folder(name), batch=1, apart=True)
    layer = network.blocks[1].layers[-1]
    needs = {layer.name: ("fisher blocks",)}
    found = next(own["fisher blocks"] for block in backward_statistics(walk, needs) for own in block.values())
    model = tiny_models.load(name, family_folder(name))
    weight = model.get_submodule(layer.name).weight
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        drawn = sampled_labels(model(input_ids=IDS).logits.flatten(0, 1), generator).view(IDS.shape)
    total = torch.zeros_like(found)
    for sample, labels in zip(IDS.split(1), drawn, strict=True):
        loss = nn.functional.cross_entropy(model(input_ids=sample).logits[0, :-1], labels[:-1], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [weight])
        flat = (gradient.T if layer.transposed else gradient).flatten()
        rows = nn.functional.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
        total += rows[:, :, None] * rows[:, None, :]
    expected = total / IDS[:, 1:].numel()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6 * float(expected.max()))
    kept = gradients_of(name, family_folder)
    blocks = BlockRankOneSum.from_gradients(kept, BLOCK_SIZE).matrices
    torch.testing.assert_close(blocks, expected, rtol=2e-3, atol=1e-6 * float(expected.max()))


def gradients_of(name: str, family_folder: FolderOf) -> Tensor:
    """Those of each sample, scaled so that their mean g gᵀ is per token."""
    network, walk = walked(family_folder(name), batch=1, apart=True)
    layer = network.blocks[1].layers[-1]
    needs = {layer.name: ("fisher gradients",)}
    return next(own["fisher gradients"] for block in backward_statistics(walk, needs) for own in block.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "gpt-neox", "bert"])
def test_sensitivities_are_the_true_fisher_of_each_sample(name: str, family_folder: FolderOf) -> None:
    """One sample at a time through plain transformers: a mini-batch's mean gradient squared would not pass.

    Of the weights the Fisher's diagonal, per position.
    """
    network, found = streamed(family_folder(name), batch=2)
    model = tiny_models.load(name, family_folder(name))
    model.requires_grad_(False)
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs[name] = arguments[0].detach().flatten(0, -2)
        outputs[name] = output.detach().requires_grad_() if not output.requires_grad else output
        outputs[name].retain_grad()
        return outputs[name]

    for layer in network.layers:
        model.get_submodule(layer.name).register_forward_hook(partial(watch, layer.name))
    encoder = name in tiny_models.ENCODERS
    generator = torch.Generator().manual_seed(SEED)
    if encoder:
        drawn = [torch.randn(IDS.shape[1], model.config.hidden_size, generator=generator) for _ in IDS]
    else:
        with torch.no_grad():
            drawn = list(sampled_labels(model(input_ids=IDS).logits.flatten(0, 1), generator).view(IDS.shape))
    squares: dict[str, Tensor] = {}
    for sample, labels in zip(IDS.split(1), drawn, strict=True):
        if encoder:
            loss = (model.base_model(input_ids=sample).last_hidden_state * labels).sum()
        else:
            logits = model(input_ids=sample).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, labels[:-1], reduction="sum")
        loss.backward()
        for layer, output in outputs.items():
            square = output.grad.flatten(0, -2).square()
            squares[layer] = squares.get(layer, 0) + square.sum(0)
            squares[f"{layer}.weight"] = squares.get(f"{layer}.weight", 0) + square.T @ inputs[layer].square()
    count = IDS.numel() if encoder else IDS[:, 1:].numel()
    names = {layer.name for layer in network.layers}
    assert found.keys() == squares.keys() == names | {f"{name}.weight" for name in names}
    for layer, square in squares.items():
        torch.testing.assert_close(found[layer], square / count, rtol=2e-3, atol=1e-6 * square.max() / count)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "phi3"])
def test_the_streamed_factors_are_those_of_the_whole_model(name: str, family_folder: FolderOf) -> None:
    """An Objective on plain transformers, all in memory: the same labels, factors, diagonals, norms."""
    kinds: list[Any] = ["gram", "kronecker", "fisher"]
    network, walk = walked(family_folder(name), batch=1 if name == "opt" else 2, apart=True)  # OPT mixes samples
    model = tiny_models.load(name, family_folder(name)).eval()
    names = [f"{layer.name}.weight" for layer in network.layers]
    data = [(ids, next_tokens(ids)) for ids in IDS.split(2)]
    objective = Objective.of(model, CrossEntropy(), data, names, forward=lambda m, ids: m(input_ids=ids).logits)
    whole = estimate_curvatures(objective, kinds, seed=SEED)
    seen = set()
    for block, passages in walk:
        parts = {f"{layer.name}.weight": [layer_part(layer)] for layer in block.layers}
        weights = {f"{layer.name}.weight": layer.module.weight for layer in block.layers}
        sums = Sums(parts, weights, kinds)
        for passage in passages:
            sums.add(passage)
        found = sums.estimates(walk.scale, walk.origin.matrix, "mean loss")
        for key, weight in weights.items():
            seen.add(key)
            probe = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            for ours, theirs in ((found.kronecker, whole.kronecker), (found.fisher, whole.fisher)):
                assert ours[key].origin == theirs[key].origin
                expected = theirs[key].matvec(probe)
                torch.testing.assert_close(
                    ours[key].matvec(probe), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
                )
            assert found.gram[key].tokens == whole.gram[key].tokens
            torch.testing.assert_close(found.squared_norms[key], whole.squared_norms[key], rtol=1e-3, atol=1e-9)
    assert seen == set(names)


def test_layers_that_mix_samples_are_refused_where_samples_count(family_folder: FolderOf) -> None:
    _, walk = walked(family_folder("mixtral"), batch=2, apart=True)
    blocks = iter(walk)  # kept, so that the block stays loaded
    _, passages = next(blocks)
    with pytest.raises(UnsupportedModelError, match="mixes the samples of a batch"):
        list(passages)


def test_blocks_that_are_not_looked_at_still_carry_the_gradient(family_folder: FolderOf) -> None:
    _, walk = walked(family_folder("llama"), batch=2)
    first = [block.name for block, _ in walk][-1]
    sums = {}
    for look in (True, False):
        _, walk = walked(family_folder("llama"), batch=2)
        for block, passages in walk:
            if look or block.name == first:
                found = OutputMoments([layer_part(layer) for layer in block.layers], "position")
                for passage in passages:
                    found.add(passage)
                sums[look, block.name] = found.sums
    for key, moment in sums[True, first].items():
        assert torch.equal(moment.total, sums[False, first][key].total)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_shares_of_the_samples_get_the_labels_that_they_get_together(name: str, family_folder: FolderOf) -> None:
    """Several processes walk with a share each; what they find adds up to what one process finds."""

    def sums(start_at: int, stop_at: int) -> dict[str, Tensor]:
        network = CheckpointNetwork(Checkpoint(family_folder(name)), torch.float32, CPU)
        flows = start(network, IDS[start_at:stop_at].split(1))
        inputs = []
        for index, block in enumerate(network.blocks):
            inputs.append([flow.waiting for flow in flows])
            with network.loaded(block) as module:
                advance(flows, module, index)
        walk = BackwardPass(network, flows, inputs, SEED, earlier=list(IDS[:start_at].unsqueeze(1)))
        needs = {layer.name: ("output diagonal",) for layer in network.layers}
        found = {layer: own for block in backward_statistics(walk, needs) for layer, own in block.items()}
        return {layer: own["output diagonal"] / walk.scale for layer, own in found.items()}

    half = len(IDS) // 2
    whole, first, second = sums(0, len(IDS)), sums(0, half), sums(half, len(IDS))
    for layer, expected in whole.items():
        torch.testing.assert_close(first[layer] + second[layer], expected, rtol=1e-4, atol=1e-6)


def test_sensitivities_do_not_depend_on_the_batches(family_folder: FolderOf) -> None:
    one, all_at_once = (streamed(family_folder("llama"), batch)[1] for batch in (1, 4))
    for name, square in one.items():
        torch.testing.assert_close(square, all_at_once[name], rtol=1e-3, atol=0)
