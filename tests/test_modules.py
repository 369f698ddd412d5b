"""Networks of the user's own: every method on plain modules, held against each layer solved by hand."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import digits
import hesse
from helpers import compress_module, fast_first
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.constraints import GridCode, LowRankCode
from hesse.curvature import Gram, Kronecker, SquaredError, UserLoss
from hesse.curvature.losses import next_tokens
from hesse.errors import DataError, HesseError, OptionError, UnsupportedModelError, UnsupportedProduct
from hesse.methods import Recipe, methods_of
from tiny_models import random_ids

COMPRESSING = methods_of("compress")

FEW = 128  # images
# What fits the narrow layers of small networks.
OPTIONS: dict[str, dict[str, Any]] = {
    "grid": {"bits": 3, "group_size": 16},
    "sparse": {"sparsity": 0.5},
    "low_rank": {"rank": 2},
    "codebook": {"bits": 2},
    "table": {"group_size": 16},
    "vector_codebook": {"vector_length": 2},
}


def options_of(method: str) -> hesse.Options:
    given = [OPTIONS[part] for part in COMPRESSING[method].constraints if part in OPTIONS]
    return hesse.Options(**{key: value for options in given for key, value in options.items()})


def compress(model: nn.Module, data: digits.Batches, method: str, **options: Any) -> Any:
    names = hesse.Options.__dataclass_fields__
    chosen = {name: options.pop(name) for name in list(options) if name in names}
    return compress_module(model, data, method=method, options=hesse.Options(**chosen), **options)


def small_net() -> nn.Module:
    """A convolution, a norm and two layers, of too few weights to take time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(96, 12),
        nn.GELU(),
        nn.Linear(12, 10),
    )


def matrix(module: nn.Module) -> Tensor:
    """The weight (out, in) that a layer stands for, or two in its place."""
    if isinstance(module, nn.Sequential):
        left, right = matrix(module[1]), matrix(module[0])
        return left @ right
    return module.weight.detach().flatten(1)  # type: ignore[operator, union-attr]


OF_CHECKPOINTS = [
    name
    for name, method in COMPRESSING.items()
    if method.rewrite is not None or method.curvature == "attention" or method.defaults.input_bits is not None
]


@pytest.mark.parametrize("method", [name for name in COMPRESSING if name not in OF_CHECKPOINTS])
def test_every_method_leaves_members_of_its_constraint(method: str) -> None:
    model, data = small_net(), digits.batches(samples=FEW)
    before = deepcopy(model.state_dict())
    report = compress_module(model, data, method=method, options=options_of(method))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [layer.name for layer in report.layers] == ["0", "4", "6"]
    assert report.method == method
    (rule,) = COMPRESSING[method].recipe(options_of(method)).rules
    constraint = rule.constraint.build()
    for layer in report.layers:
        weight, new = before[f"{layer.name}.weight"].flatten(1), report.module.get_submodule(layer.name)
        assert layer.shape == tuple(weight.shape)
        decoded = constraint.decode(report.encoded[layer.name])
        if COMPRESSING[method].constraints == ("low_rank",):
            assert layer.rank == 2
            torch.testing.assert_close(matrix(new), decoded)
        else:
            assert torch.equal(matrix(new), decoded)
        if COMPRESSING[method].constraints == ("sparse",):
            rows = decoded if COMPRESSING[method].defaults.scope == "row" else decoded.reshape(1, -1)
            assert ((rows == 0).sum(1) == round(0.5 * rows.shape[1])).all()
        bias = new.get_parameter("1.bias" if isinstance(new, nn.Sequential) else "bias")
        assert torch.equal(bias, before[f"{layer.name}.bias"])
        assert layer.predicted_loss_increase is not None
        assert layer.predicted_loss_increase > 0
        assert layer.relative_output_error is not None
        assert 0 < layer.relative_output_error < 1
    assert report.predicted_loss_increase == pytest.approx(sum(x.predicted_loss_increase or 0 for x in report.layers))
    images, labels = (torch.cat(column) for column in zip(*data, strict=True))
    with torch.no_grad():
        for module, loss in ((model.eval(), report.loss_before), (report.module, report.loss_after)):
            assert float(nn.functional.cross_entropy(module(images), labels)) == pytest.approx(loss, abs=1e-5)
    assert "module" not in report.to_dict()


def grams(model: nn.Module, data: digits.Batches, name: str) -> Gram:
    """The Gram of a layer's inputs by a hook, patches by hand."""
    layer, rows = model.get_submodule(name), list[Tensor]()

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0].clone()
        if isinstance(module, nn.Conv2d):
            padded = nn.functional.pad(inputs, (1, 1, 1, 1))
            windows = padded.unfold(2, 3, module.stride[0]).unfold(3, 3, module.stride[1])
            inputs = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
        rows.append(inputs.flatten(0, -2))

    hook = layer.register_forward_pre_hook(note)
    with torch.no_grad():
        for images, _ in data:
            model(images)
    hook.remove()
    return Gram.from_inputs(torch.cat(rows))


def slopes(model: nn.Module, data: digits.Batches, name: str) -> Tensor:
    """E[ggᵀ] of the data's own labels at a layer's outputs, by plain autograd."""
    layer, found = model.get_submodule(name), list[Tensor]()
    hook = layer.register_forward_hook(lambda module, _, output: found.append(output.retain_grad() or output))
    images, labels = (torch.cat(column) for column in zip(*data, strict=True))
    nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
    hook.remove()
    gradient = found[0].grad
    assert gradient is not None
    rows = gradient.movedim(1, -1).flatten(0, -2) if gradient.ndim == 4 else gradient
    return rows.T @ rows / len(labels)


@pytest.mark.parametrize("method", ["gptq", "sparsegpt", "activation-svd", "kronecker", "kronecker-svd"])
def test_layers_are_solved_one_after_another_on_what_the_changed_ones_give(method: str) -> None:
    model, data = small_net().eval(), digits.batches(samples=FEW)
    model[2].inplace = False
    report = compress_module(model, data, method=method, options=options_of(method), kind="empirical")
    (rule,) = COMPRESSING[method].recipe(options_of(method)).rules
    by_hand = deepcopy(model)
    for name in ("0", "4", "6"):
        gram = grams(by_hand, data, name)
        curvature: hesse.curvature.Curvature = gram.damped(rule.solver.damping)
        if method.startswith("kronecker"):
            outputs = slopes(model, data, name)
            plain = Kronecker(output_factor=outputs, input_factor=gram.second_moment)
            curvature = plain.with_damped_factors(rule.solver.output_damping, rule.solver.damping)
        weight, new = by_hand.get_submodule(name).weight, matrix(report.module.get_submodule(name))
        found = hesse.solve(weight.detach().flatten(1), curvature, rule.constraint.build(), rule.solver.build()).weight
        # A last digit of the Gram may turn a choice between two of nearly the same cost.
        assert float((new - found).abs().gt(1e-3).double().mean()) < 0.05
        before = matrix(by_hand.get_submodule(name))
        assert curvature.quadratic(new - before) == pytest.approx(curvature.quadratic(found - before), rel=1e-2)
        factor = slopes(model, data, name)
        seen = Kronecker(
            output_factor=factor if method.startswith("kronecker") else factor.diagonal(),
            input_factor=gram.second_moment,
        )
        layer = next(layer for layer in report.layers if layer.name == name)
        assert layer.predicted_loss_increase == pytest.approx(seen.quadratic(new - before), rel=1e-3)
        weight.data = new.view(weight.shape)


@pytest.mark.parametrize(
    ("method", "options"), [("sparsegpt", {}), ("kronecker", {"bits": 4}), ("kronecker-svd", {"rank": 8})]
)
@pytest.mark.parametrize("name", fast_first(digits.NETS, 2))
def test_trained_networks_are_pruned_quantised_and_factorised(name: str, method: str, options: dict[str, Any]) -> None:
    model, narrow = digits.trained(name), {"mlp": (), "conv": ("stem.0",), "vit": ("patches",)}[name]
    dense = digits.accuracy(model)
    assert dense > 0.93
    report = compress(model, digits.batches(samples=512), method, ignore=narrow if "rank" in options else (), **options)
    assert report.loss_before < 0.1
    assert report.predicted_loss_increase > 0
    if method == "kronecker":
        assert digits.accuracy(report.module) > dense - 0.02
        assert report.measured_loss_increase < 0.02
        assert all(len(group.unique()) <= 16 for layer in report.layers for group in codes(report, layer.name))
    if method == "sparsegpt":
        assert all(layer.sparsity == pytest.approx(0.5, abs=1e-3) for layer in report.layers)
    if method == "kronecker-svd":
        before, after = (sum(p.numel() for p in module.parameters()) for module in (model, report.module))
        assert after < 0.9 * before
        kept = digits.batches("test", 8)[0][0]
        with torch.no_grad():
            assert report.module(kept).shape == model(kept).shape


def codes(report: Any, layer: str) -> Tensor:
    code = report.encoded[layer]
    assert isinstance(code, GridCode)
    return code.codes


@pytest.mark.parametrize("scope", ["row", "global", "lamp"])
def test_a_share_is_counted_where_the_scope_says(scope: str) -> None:
    report = compress(small_net(), digits.batches(samples=FEW), "magnitude", sparsity=0.6, scope=scope)
    weights = {layer.name: matrix(report.module.get_submodule(layer.name)) for layer in report.layers}
    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    if scope == "row":
        for weight in weights.values():
            assert ((weight == 0).sum(1) == round(0.6 * weight.shape[1])).all()
    else:
        assert zeros == round(0.6 * total)
    if scope == "global":
        original = {layer: matrix(small_net().get_submodule(layer)) for layer in weights}
        kept = torch.cat([original[x][weights[x] != 0] for x in weights]).abs().min()
        assert kept >= torch.cat([original[x][weights[x] == 0] for x in weights]).abs().max()


def test_patterns_hold_in_every_group_of_columns() -> None:
    model = digits.trained("mlp")
    report = compress(model, digits.batches(samples=FEW), "sparsegpt", sparsity="2:4", bits=4, group_size=32)
    for name in ("1", "3", "5"):
        weight = matrix(report.module.get_submodule(name))
        assert ((weight.view(len(weight), -1, 4) != 0).sum(-1) <= 2).all()
        assert all(len(group.unique()) <= 16 for row in weight for group in row.split(32))


class Shared(nn.Module):
    """Layers that share inputs, patches of them, weights or calls, or are of a kind that is left alone."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.after = nn.Conv2d(4, 4, 1)
        self.again = nn.Conv2d(4, 4, 1)
        self.groups = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.twice = nn.Linear(64, 64)
        self.tied, self.owner = nn.Linear(64, 5), nn.Embedding(5, 64)
        self.tied.weight = self.owner.weight
        self.never = nn.Linear(3, 3)
        self.free = nn.Parameter(torch.ones(5, 10))
        self.activation = nn.ReLU(inplace)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.wide(images) + self.narrow(images)
        hidden = self.activation(hidden)  # in place
        hidden = self.groups(self.again(hidden) + self.after(hidden)).mean(1).flatten(1)
        result: Tensor = self.tied(self.twice(self.twice(hidden).relu())) @ self.free
        return result


def test_what_cannot_be_changed_alone_is_left_with_a_note() -> None:
    torch.manual_seed(0)
    model = Shared()
    report = compress(model, digits.batches(samples=FEW), "gptq", group_size=16)
    assert [layer.name for layer in report.layers] == ["wide", "narrow", "again", "after", "twice"]
    notes = "\n".join(report.notes)
    for expected in (
        "groups: unchanged: a convolution in 2 groups is not a single matrix",
        "tied: unchanged: its weight is shared with another module",
        "never: left as it is: it is never called",
        "twice: is called several times in a forward, and is solved for the inputs of its first call",
        "free: unchanged, because they are not the weight of a layer",
    ):
        assert expected in notes
    for name in ("groups", "tied", "never", "owner"):
        assert torch.equal(report.module.get_submodule(name).weight, model.get_submodule(name).weight)


def test_layers_see_their_own_inputs_though_tensors_are_shared_or_changed_in_place() -> None:
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        report = compress(Shared(inplace), digits.batches(samples=FEW), "gptq", group_size=16)
        found.append([matrix(report.module.get_submodule(layer.name)) for layer in report.layers])
        assert [layer.tokens for layer in report.layers[:2]] == [FEW * 64] * 2
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("method", "options"), [("wanda", {}), ("gptq", {"bits": 3}), ("svd", {"rank": 4})])
def test_an_encoder_with_a_classifier(method: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=6
    )
    model = transformers.BertForSequenceClassification(config)
    ids, labels = torch.tensor(random_ids(8, 12)), torch.arange(8) % 6
    data = [({"input_ids": part, "attention_mask": torch.ones_like(part)}, target)
            for part, target in zip(ids.split(3), labels.split(3), strict=True)]  # fmt: skip
    report = compress(model, data, method, forward=lambda module, inputs: module(**inputs).logits, **options)  # type: ignore[arg-type]
    assert len(report.layers) == 2 * 6 + 2
    assert report.predicted_loss_increase > 0
    assert not [note for note in report.notes if "left" in note]


@pytest.mark.parametrize(
    ("method", "options"), [("sparsegpt", {}), ("kronecker", {"bits": 4}), ("activation-svd", {"rank": 16})]
)
def test_a_language_model_as_a_plain_module(method: str, options: dict[str, Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32)
    ids = torch.randint(5, 1000, (4, 16), generator=torch.Generator().manual_seed(0))
    data = [(part, next_tokens(part)) for part in ids.split(2)]
    chosen = ("*.layers.0.mlp.*", "*.layers.0.self_attn.*")
    report = compress(model, data, method, layers=chosen, forward=lambda m, x: m(input_ids=x).logits, **options)
    assert len(report.layers) == 7
    assert all(layer.tokens == 64 for layer in report.layers)
    with torch.no_grad():
        for module, loss in ((model, report.loss_before), (report.module, report.loss_after)):
            assert float(module(input_ids=ids, labels=ids).loss) == pytest.approx(loss, abs=1e-4)


def test_a_convolution_in_one_dimension_and_the_transposed_layers_of_gpt2() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 6, 3, 2, 1, 2), nn.Flatten(), transformers.pytorch_utils.Conv1D(10, 186))
    data = [(images.flatten(2), labels) for images, labels in digits.batches(samples=FEW)]
    report = compress(model, data, "activation-svd", rank=2)
    weights = [matrix(model[0]), matrix(model[2]).T]
    with torch.no_grad():
        for layer, weight, code in zip(report.layers, weights, report.encoded.values(), strict=True):
            new = report.module.get_submodule(layer.name)
            assert isinstance(code, LowRankCode)
            torch.testing.assert_close(matrix(new), code.left @ code.right)
            assert layer.shape == tuple(weight.shape)
        whole = deepcopy(model)
        whole[0].weight.data = matrix(report.module[0]).view(6, 1, 3)
        whole[2].weight.data = matrix(report.module[2]).T
        torch.testing.assert_close(report.module(data[0][0]), whole(data[0][0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_convolutions_that_pad_by_name_or_not_with_zeros(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, **settings), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10))
    data = digits.batches(samples=FEW)
    report = compress(model, data, "activation-svd", rank=2, ignore=["3"])
    whole = deepcopy(model)
    whole[0].weight.data = matrix(report.module[0]).view(6, 1, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(report.module(data[0][0]), whole(data[0][0]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(report.module[0].weight, whole[0].weight)
    assert str(report.report).startswith("activation-svd: ")
    assert "Conv2d" not in repr(report)


def test_results_are_in_the_models_own_type_and_can_be_trained_on() -> None:
    model = small_net().to(torch.bfloat16)
    data = [(images.to(torch.bfloat16), labels) for images, labels in digits.batches(samples=FEW)]
    model[6].weight.requires_grad_(False)
    for method in ("gptq", "activation-svd"):
        report = compress_module(model, data, method=method, options=options_of(method), ignore=("6",))
        assert {p.dtype for p in report.module.parameters()} == {torch.bfloat16}
        report.module(data[0][0]).float().logsumexp(-1).sum().backward()
        frozen = {name for name, p in report.module.named_parameters() if p.grad is None}
        assert frozen == {"6.weight"}


def test_losses_of_other_kinds() -> None:
    model, (images, labels) = small_net(), digits.batches(samples=64)[0]
    targets = nn.functional.one_hot(labels, 10).float()
    squared = compress(model, [(images, targets)], "kronecker", loss_function=nn.MSELoss())
    assert squared.loss_before == pytest.approx((model.eval()(images) - targets).square().mean().item(), rel=1e-4)
    same = compress(model, [(images, targets)], "kronecker", loss_function=SquaredError())
    assert {**squared.to_dict(), "seconds": {}} == {**same.to_dict(), "seconds": {}}
    own = UserLoss(function=lambda outputs, labels: nn.functional.cross_entropy(outputs, labels, reduction="none"))
    with pytest.raises(UnsupportedProduct, match="empirical"):
        compress(model, [(images, labels)], "kronecker", loss_function=own)
    mine = compress(model, [(images, labels)], "kronecker", loss_function=own, kind="empirical")
    plain = compress(model, [(images, labels)], "kronecker", kind="empirical")
    assert mine.predicted_loss_increase == pytest.approx(plain.predicted_loss_increase, rel=1e-3)


class Alarmed(nn.Module):
    """A network that must not be run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 20), nn.Linear(20, 10)

    def forward(self, _: Tensor) -> Tensor:
        raise AssertionError("it was run")


DATA = [(torch.zeros(2, 30), torch.zeros(2, dtype=torch.long))]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sparsegpt", {"sparsity": "2:4"}, "first: sparsity 2:4 needs a width divisible by 4, and this one is 30"),
        ("squeezellm", {"bits": 5}, "first: a codebook of 32 values is as large as a row of 30 weights, or larger"),
        ("svd", {"rank": 10}, "second: rank 10 is not below the smaller side of a weight 10 x 20: use at most 9"),
        ("svd", {"rank": 64}, "first: rank 64 is not below"),
        ("gptq", {"bits": 9}, "bits is 9, but a Grid has 2 to 8"),
        ("obert", {"scope": "row"}, "use the scope layer"),
        ("gptq", {"ignore": ("*",)}, "no layer is left to compress"),
        ("gptq", {"layers": ("third",)}, "the pattern 'third' matches no layer of this model; a layer's name is first"),
        ("gptx", {}, "there is no method 'gptx'"),
        ("gptq", {"loss_function": nn.NLLLoss()}, "NLLLoss is no loss that Hesse knows"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_network_is_run(
    method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HesseError, match=message):
        compress(Alarmed(), DATA, method, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compress(nn.Linear(3, 3), DATA, "gptq"), OptionError, "put it into an nn.Sequential"),
        (lambda: compress(nn.Sequential(nn.ReLU()), DATA, "gptq"), UnsupportedModelError, "has no linear or conv"),
        (lambda: compress(Alarmed(), [{"x": 1, "y": 2}], "gptq"), OptionError, "batch 0 has no labels"),
        (lambda: compress(small_net(), [], "gptq"), DataError, "the data holds no batch"),
        (
            lambda: compress_module(
                small_net(), DATA, recipe=Recipe(rules=COMPRESSING["rtn"].recipe(hesse.Options()).rules), ignore=("0",)
            ),
            OptionError,
            "a recipe says everything itself",
        ),
    ],
)
def test_refusals(call: Callable[[], object], error: type[HesseError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_recipe_gives_each_layer_its_own_rule() -> None:
    pruned = COMPRESSING["sparsegpt"].recipe(hesse.Options()).rules[0].model_copy(update={"layers": ("0",)})
    rounded = COMPRESSING["gptq"].recipe(hesse.Options(bits=3)).rules[0].model_copy(update={"layers": ("4",)})
    data = iter(digits.batches(samples=FEW))  # walked once
    report = compress_module(small_net(), data, recipe=Recipe(rules=(pruned, rounded)))
    assert [(layer.name, layer.method) for layer in report.layers] == [
        ("0", "Gram × Sparse × ErrorFeedback"),
        ("4", "Gram × Grid × ErrorFeedback"),
    ]


def test_a_path_that_depends_on_the_data_is_refused() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(64, 10), nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            rows = images.flatten(1)
            if len(rows) == digits.BATCH:
                rows = self.right(rows).repeat(1, 7)[:, :64]
            result: Tensor = self.left(rows)
            return result

    data = digits.batches(samples=digits.BATCH + 9)
    with pytest.raises(UnsupportedModelError, match="Fork calls its layers in an order that depends on the data"):
        compress(Fork(), data, "gptq")


def test_the_same_seed_gives_the_same_result() -> None:
    reports = [compress(small_net(), digits.batches(samples=FEW), "kronecker", group_size=16, seed=3) for _ in range(2)]
    first, second = ({**report.to_dict(), "seconds": {}} for report in reports)
    assert first == second
