"""Mixtures of experts: separate linear layers compute what every class of transformers computes."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from hesse.networks.experts import BatchedExperts, LinearExperts, unfuse

EXPERTS, HIDDEN, INNER, TOKENS = 4, 12, 10, 21
NAMES = ("gate_proj", "up_proj", "down_proj")
MARK = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)


def marked_classes() -> list[tuple[str, str]]:
    """Return the module and name of every class that transformers marks by use_experts_implementation."""
    files = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    return [
        (f"transformers.models.{file.parent.name}.{file.stem}", name)
        for file in files
        for name in MARK.findall(file.read_text(encoding="utf-8"))
    ]


class Settings:
    """Configuration with the settings that classes of experts read."""

    _experts_implementation = "eager"
    hidden_act = hidden_activation = mlp_hidden_act = "silu"
    moe_latent_size = None
    swiglu_limit, swiglu_alpha, post_norm_eps = 0.05, 1.7, 1e-5

    def __getattr__(self, name: str) -> Any:
        if "expert" in name and "size" not in name:
            return EXPERTS
        if "intermediate" in name:
            return INNER
        if "softcap" in name:
            return 3.0
        if "hidden" in name:
            return HIDDEN
        raise AttributeError(name)


def random_parameters(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def linear_twin(fused: nn.Module) -> LinearExperts:
    """Return the linear layers of a fused module, with its weights."""
    model = nn.ModuleDict({"experts": fused})
    whole = {f"experts.{name}": parameter.detach() for name, parameter in fused.named_parameters()}
    places = unfuse(model, lambda path, module: NAMES)
    for name, place in places.items():
        module, kind = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(module, kind, nn.Parameter(place.of(whole[place.parameter]).clone()))
    twin = model["experts"]
    assert isinstance(twin, LinearExperts)
    assert not any(parameter.is_meta for parameter in twin.parameters())
    return twin


def routed(count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, chosen experts and their weights; the last expert is chosen by no token."""
    hidden = torch.randn(TOKENS, HIDDEN)
    chosen = torch.rand(TOKENS, EXPERTS - 1).topk(count).indices
    return hidden, chosen, torch.rand(TOKENS, count)


@pytest.mark.parametrize(("module", "name"), marked_classes(), ids=lambda value: value.rpartition(".")[2])
def test_linear_experts_compute_what_transformers_computes(module: str, name: str) -> None:
    torch.manual_seed(0)
    try:
        fused = getattr(importlib.import_module(module), name)(Settings())
    except ImportError as error:
        pytest.skip(str(error))
    random_parameters(fused)
    arguments = routed()
    expected = fused(*arguments)
    torch.testing.assert_close(linear_twin(fused)(*arguments), expected.to(arguments[0]), rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.01


def test_all_classes_of_experts_are_tried() -> None:
    assert len(marked_classes()) > 60


def test_experts_of_dbrx() -> None:
    fused = DbrxExperts(DbrxFFNConfig(hidden_size=HIDDEN, ffn_hidden_size=INNER, moe_num_experts=EXPERTS))
    random_parameters(fused)
    hidden, chosen, weights = routed()
    arguments = hidden.view(3, 7, HIDDEN), chosen, weights
    torch.testing.assert_close(linear_twin(fused)(*arguments), fused(*arguments), rtol=1e-5, atol=1e-5)


def test_experts_of_llama_4_read_only_their_tokens() -> None:
    fused = Llama4TextExperts(
        transformers.Llama4TextConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    )
    random_parameters(fused)
    scores = torch.rand(EXPERTS, TOKENS, 1) * (torch.rand(EXPERTS, TOKENS, 1) > 0.6)
    hidden = (scores * torch.randn(TOKENS, HIDDEN)).view(-1, HIDDEN)
    twin, read = linear_twin(fused), list[int]()
    assert isinstance(twin, BatchedExperts)
    for expert in range(EXPERTS):
        twin.layers(expert)[0].register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    torch.testing.assert_close(twin(hidden), fused(hidden), rtol=1e-5, atol=1e-5)
    assert read == (scores != 0).sum((1, 2)).tolist()


def test_experts_of_jetmoe() -> None:
    fused = JetMoeParallelExperts(EXPERTS, HIDDEN, INNER)
    random_parameters(fused)
    hidden, sizes = torch.randn(TOKENS, HIDDEN), [5, 0, 9, 7]
    torch.testing.assert_close(linear_twin(fused)(hidden, sizes), fused(hidden, sizes), rtol=1e-5, atol=1e-5)


def test_every_expert_is_called_in_each_batch() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    fused = MixtralExperts(Settings())  # type: ignore[arg-type]
    random_parameters(fused)
    twin, called = linear_twin(fused), list[str]()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, ___, name=name: called.append(name))
    twin(*routed())
    assert called == [f"{expert}.{name}" for expert in range(EXPERTS) for name in NAMES]
