"""Groups that can be taken out of a network: zeroing them equals slicing them, for every family and kind of layer."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hesse.errors import OptionError, UnsupportedModelError
from hesse.partitions import (
    Group,
    TracedGroups,
    check_groups,
    check_slicing,
    loading_problem,
    slice_groups,
    trace_groups,
)
from tiny_models import FAMILIES

IDS = {"input_ids": torch.randint(5, 500, (2, 7), generator=torch.Generator().manual_seed(0))}
PRECISE = 1e-10
# Heads that stay, and why: one norm over all of them, one key and value for all, slopes that count them.
WITHOUT_HEADS = {
    "olmoe": "q_norm takes them together",
    "falcon": "with a constant",
    "falcon-alibi": "nothing would be left",
}
# Families whose configuration cannot say a number of heads apart from the width.
HEADS_IN_MEMORY = ("opt", "gpt2", "gpt-neox", "falcon-new", "bert", "bert-masked", "roberta", "minilm")


def family(name: str) -> Any:
    """A random model with weights large enough to tell mistakes apart, in float64."""
    architecture, configuration, options = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, configuration)(**options)).eval().double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return eager(model)


def eager(model: Any) -> Any:
    """Experts in plain operations: the fused ones have no float64."""
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")
    return model.eval()


def some_of(partition: TracedGroups, kind: str, uneven: bool = False) -> list[Group]:
    """A third of each site's groups of a kind, or from each site one more than from the site before."""
    chosen, pick = [], random.Random(0)
    for place, site in enumerate(partition.sites((kind,)).values()):
        count = max(1, len(site) // 3) + (place % 3 if uneven else 0)
        chosen += pick.sample(site, min(count, len(site) - (2 if kind == "experts" else 1)))
    return chosen


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_zeroed_and_sliced_families_agree_and_load(name: str, tmp_path: Path) -> None:
    model = family(name)
    partition = trace_groups(model, IDS)
    before = outputs(model, IDS)
    for kind in ("heads", "hidden", "experts"):
        groups = some_of(partition, kind)
        if not groups:
            assert kind == "experts" or name in WITHOUT_HEADS
            continue
        sliced, difference = check_slicing(model, groups, IDS)
        assert difference < PRECISE
        assert (outputs(sliced, IDS) - before).abs().max() > 1e-3  # something did go
        lost = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in sliced.parameters())
        assert lost == sum(group.parameters(model) for group in groups)
        in_memory = kind == "heads" and name in HEADS_IN_MEMORY
        assert bool(loading_problem(sliced)) == in_memory
        if not in_memory:
            sliced.save_pretrained(tmp_path / kind)
            back = eager(type(model).from_pretrained(tmp_path / kind, dtype=torch.float64))
            assert torch.allclose(outputs(back, IDS), outputs(sliced, IDS), atol=PRECISE)


@pytest.mark.parametrize(("name", "kind"), [("llama", "hidden"), ("gpt2", "heads"), ("qwen2-moe", "hidden")])
def test_uneven_widths_stay_in_memory(name: str, kind: str) -> None:
    model = family(name)
    sliced, difference = check_slicing(model, some_of(trace_groups(model, IDS), kind, uneven=True), IDS)
    assert difference < PRECISE
    assert "its configuration cannot say that" in str(loading_problem(sliced))


@pytest.mark.parametrize("name", WITHOUT_HEADS)
def test_heads_that_stay_have_a_reason(name: str) -> None:
    partition = trace_groups(family(name), IDS)
    assert not partition.sites(("heads",))
    reasons = [
        why for where, why in partition.fixed.items() if "q_proj" in where or "query_key_value.weight, axis 0" in where
    ]
    assert any(WITHOUT_HEADS[name] in why for why in reasons)
    with pytest.raises(OptionError, match="the network has no heads that can be taken out"):
        partition.of_kinds(["heads"])


def test_a_head_of_grouped_attention_is_a_key_and_value_with_its_queries() -> None:
    group = trace_groups(family("llama"), IDS).sites(("heads",))["heads of model.layers.0.self_attn.q_proj"][1]
    rows = {part.parameter.split(".")[-2]: part.indices for part in group.slices}
    one, two = tuple(range(16, 32)), tuple(range(32, 64))
    assert rows == {"q_proj": two, "k_proj": one, "v_proj": one, "o_proj": two}


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, 1 + (inputs != width), padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norms = nn.ModuleList([norm(width), norm(width)])
        self.shortcut = nn.Conv2d(inputs, width, 1, 2) if inputs != width else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norms[0](self.first(images)))
        return torch.relu(self.norms[1](self.second(hidden)) + self.shortcut(images))


def residual_net(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3), norm(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(Residual(8, 8, norm), Residual(8, 16, norm), Residual(16, 16, norm)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)),
    )


def grouped_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
        *(nn.Conv2d(8, 12, 1), nn.Conv2d(12, 24, 3, groups=4), nn.GELU(), nn.Conv2d(24, 6, 1)),
        *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.ConvTranspose2d(6, 4, 2, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 3)),
    )


class PlainViT(nn.Module):
    """A vision transformer of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 32, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 10, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1) + self.places
        result: Tensor = self.head(self.encoder(tokens)[:, 0])
        return result


def library_vit() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=12, patch_size=4, num_channels=2, num_labels=5)
    return transformers.ViTForImageClassification(config)


VISION: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "batch norm": (lambda: residual_net(nn.BatchNorm2d), ("channels",)),
    "group norm": (lambda: residual_net(lambda width: nn.GroupNorm(4, width)), ("channels",)),
    "grouped": (grouped_net, ("channels",)),
    "plain vit": (PlainViT, ("heads", "hidden")),
    "vit": (library_vit, ("heads", "hidden")),
}


def vision(name: str) -> nn.Module:
    """A random network in float64, with statistics and offsets as after training."""
    torch.manual_seed(0)
    model = VISION[name][0]().double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data += 0.2 * torch.rand_like(tensor)
    return model


IMAGES = torch.randn(3, 2, 20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", VISION)
@settings(max_examples=6, deadline=None, database=None)
@given(seed=st.integers(0, 1000))
def test_zeroed_and_sliced_vision_networks_agree(name: str, seed: int) -> None:
    model, kinds = vision(name), VISION[name][1]
    images = IMAGES[:, :, :12, :12] if "vit" in name else IMAGES
    partition = trace_groups(model, images)
    pick = random.Random(seed)
    sites = partition.sites()
    assert {groups[0].kind for groups in sites.values()} == set(kinds)
    groups = [group for site in sites.values() for group in pick.sample(site, pick.randint(1, len(site) - 1))]
    sliced, difference = check_slicing(model, groups, images)
    assert difference < PRECISE
    assert (outputs(sliced, images) - outputs(model, images)).abs().max() > 1e-3


def test_residual_channels_go_together() -> None:
    partition = trace_groups(vision("batch norm"), IMAGES)
    (group, *_) = partition.sites()["channels of 5.second"]
    made = {part.parameter for part in group.produced}
    assert {"5.second.weight", "5.shortcut.weight", "6.second.weight", "6.norms.1.bias"} <= made
    assert {part.parameter: part.indices for part in group.read}["9.weight"] == (0, 1, 2, 3)  # 2 × 2 positions


@pytest.mark.parametrize("name", ["batch norm", "grouped", "plain vit"])
def test_every_index_is_in_one_group_or_fixed(name: str) -> None:
    model = vision(name)
    partition = trace_groups(model, IMAGES[:, :, :12, :12] if "vit" in name else IMAGES)
    counts: dict[tuple[str, int], int] = {}
    for group in partition.groups:
        for part in group.slices:
            counts[part.parameter, part.axis] = counts.get((part.parameter, part.axis), 0) + len(part.indices)
    for key, parameter in model.named_parameters():
        for axis, size in enumerate(parameter.shape):
            if size > 1:
                assert counts.get((key, axis), 0) == (0 if f"{key}, axis {axis}" in partition.fixed else size)
    partition.check(model)
    with pytest.raises(OptionError, match="a group of another model"):
        partition.check(nn.Linear(2, 2))


class Branch(nn.Module):
    """A path that depends on the data."""

    def forward(self, values: Tensor) -> Tensor:
        return values if values.sum() > 0 else -values


class Inverse(nn.Module):
    """An operation that mixes everything."""

    def forward(self, values: Tensor) -> Tensor:
        return torch.linalg.pinv(values)


class Shuffle(nn.Module):
    """A view that knows its width by heart."""

    def forward(self, values: Tensor) -> Tensor:
        return values.view(len(values), 2, -1).transpose(1, 2).reshape(values.shape)


def chain(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 3)).double()


VALUES = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_an_untraceable_graph_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"the groups of 1 cannot be traced: .* depends on the values"):
        trace_groups(chain(Branch()), VALUES)
    with pytest.raises(UnsupportedModelError, match=r"the groups of 1 cannot be traced: .*linalg_pinv"):
        trace_groups(chain(Inverse()), VALUES)
    with pytest.raises(UnsupportedModelError, match=r"the groups of the model cannot be traced: .*rnn"):
        trace_groups(nn.LSTM(4, 6), torch.randn(2, 3, 4))


def test_a_width_known_by_heart_is_refused_when_cut() -> None:
    model = chain(Shuffle())
    partition = trace_groups(model, VALUES)
    with pytest.raises(UnsupportedModelError, match=r"without 0\[0\] the model"):
        check_groups(model, partition, VALUES, ["hidden"])


def test_hidden_units_that_are_not_zero_without_a_cause_stay() -> None:
    partition = trace_groups(chain(nn.Sigmoid()), VALUES)
    assert not partition.groups
    assert partition.fixed["0.weight, axis 0"] == "2 reads them where they are not zero without a cause"
    assert len(trace_groups(chain(nn.Tanh(), nn.Dropout(0.1)), VALUES).groups) == 8


def test_something_is_left_of_every_layer() -> None:
    model = chain(nn.ReLU())
    groups = trace_groups(model, VALUES).groups
    with pytest.raises(OptionError, match=r"nothing would be left of 0\.weight"):
        slice_groups(model, groups)
    with pytest.raises(OptionError, match="not a group of this model"):
        slice_groups(nn.Linear(2, 2), groups[:1])
    sliced = slice_groups(model, groups[:7])
    assert (sliced[0].out_features, sliced[2].in_features) == (1, 1)
    assert model[0].out_features == 8
    assert "has no configuration" in str(loading_problem(sliced))


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "positions first"])
def test_narrow_attention_is_attention_with_heads_at_zero(first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 4, batch_first=first, dtype=torch.float64)
    inputs = torch.randn(3, 5, 8, dtype=torch.float64)
    masks = {"attn_mask": torch.ones(5 if first else 3, 5 if first else 3, dtype=torch.bool).triu(1)}
    partition = trace_groups(attention, (inputs,) * 3, lambda m, x: m(*x, need_weights=False)[0])
    for options in ({}, masks):

        def attend(module: nn.Module, values: Any, options: dict[str, Tensor] = options) -> Any:
            return module(*values, need_weights=False, **options)[0]

        assert check_slicing(attention, partition.of_kinds(["heads"])[1:3], (inputs,) * 3, attend)[1] < PRECISE
