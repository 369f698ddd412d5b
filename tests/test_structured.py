"""Structured pruning: scores against their definitions, budgets, refits, implants, half-spaces, and what is refused."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import combinations
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import digits
import hesse
from hesse.curvature import CrossEntropy, Hessian, Objective
from hesse.curvature.losses import next_tokens
from hesse.curvature.objective import label_generator
from hesse.errors import OptionError, UnsupportedModelError
from hesse.methods import METHODS, methods_of
from hesse.modules.group_ranking import Ranking, shared_numbers, uniform_numbers
from hesse.modules.implant import Implant, ImplantedLayer, implant
from hesse.modules.loss_tolerance import Hierarchy
from hesse.modules.report import PruneReport
from hesse.modules.sites import Sites
from hesse.partitions import GROUP_KINDS, Group, GroupParts, trace_groups, zero_groups
from hesse.partitions.experts import with_linear_experts
from hesse.partitions.group_parts import ROLES, slices_of
from hesse.scores import SCORES, LossEvidence, StoredWeights, find_score, register_score
from hesse.scores.parameters import hessian_trace
from hesse.scores.readers import Reader, find_readers
from hesse.scores.surgeon import DAMPING, fitted_weight, greedy_removal, independent_costs, removal_costs
from hesse.testing import normal
from hesse.training.half_space import HalfSpace
from tiny_models import FAMILIES


class Gated(nn.Module):
    """A gated block, and a read-out of it."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, width), nn.Linear(4, width)
        self.down, self.head = nn.Linear(width, 4), nn.Linear(4, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.down(nn.functional.silu(self.gate(values)) * self.up(values))
        result: Tensor = self.head(torch.tanh(hidden) + values)
        return result


def gated() -> tuple[Objective, list[Group]]:
    torch.manual_seed(0)
    model = Gated().double().eval()
    inputs, targets = normal(0, 12, 4), torch.arange(12) % 3
    objective = Objective.of(model, CrossEntropy(), list(zip(inputs.split(5), targets.split(5), strict=True)))
    groups = [group for group in trace_groups(model, inputs).groups if group.site == "gate"]
    assert len(groups) == 5
    return objective, groups


def costs(name: str, objective: Objective, groups: Sequence[Group]) -> Tensor:
    return find_score(name).costs(LossEvidence(objective), GroupParts(groups, objective.model))


def entries(model: nn.Module, group: Group, role: str) -> dict[str, Tensor]:
    """A mask of each parameter that a group has entries of in a role."""
    known = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for piece in slices_of(group, role):
        piece.fill(masks.setdefault(piece.parameter, torch.zeros_like(known[piece.parameter])), 1)
    return masks


@pytest.mark.parametrize("role", ROLES)
def test_sums_over_groups_are_sums_over_their_entries(role: str) -> None:
    model = family("mixtral")
    groups = trace_groups(model, {"input_ids": torch.tensor([[5, 6, 7, 8]])}).groups[::41]
    tensors = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    sums = GroupParts(groups, model, role)
    found = sums.sums({name: tensors[name] for name in sums.shapes})
    spread = sums.spread(torch.arange(1.0, len(groups) + 1), tensors, 0.0)
    for number, group in enumerate(groups):
        masks = entries(model, group, role)
        assert found[number].item() == pytest.approx(
            sum(float((m * tensors[n]).sum()) for n, m in masks.items()), abs=1e-3
        )
        if role == "produced" and group.kind == "hidden":
            assert all((spread[n][m > 0] == number + 1).all() for n, m in masks.items())


def sampled(objective: Objective) -> tuple[Tensor, Tensor]:
    """All inputs, and the labels that the sampled Fisher draws."""
    generator = label_generator(0)
    pairs = [(x, objective.sample_targets(x, y, generator)) for x, y in objective.batches()]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_fisher_scores_are_half_the_mean_squares_of_gradients_along_the_groups() -> None:
    objective, groups = gated()
    inputs, labels = sampled(objective)
    want = torch.zeros(len(groups), dtype=torch.float64)
    for x, y in zip(inputs.split(1), labels.split(1), strict=True):
        loss = objective.loss.terms(objective.outputs(x), y).sum()
        (gradient,) = torch.autograd.grad(loss, [objective.named["down.weight"]])
        want += (gradient * objective.named["down.weight"].detach()).sum(0).square() / 2 / len(labels)
    assert torch.allclose(costs("fisher", objective, groups), want, rtol=1e-8)


def test_taylor_scores_are_mean_squares_over_batches() -> None:
    objective, groups = gated()
    want = torch.zeros(len(groups), dtype=torch.float64)
    for x, y in objective.batches():
        (gradient,) = torch.autograd.grad(
            nn.functional.cross_entropy(objective.outputs(x), y), [objective.named["down.weight"]]
        )
        want += (gradient * objective.named["down.weight"].detach()).sum(0).square() / 3
    assert torch.allclose(costs("taylor", objective, groups), want, rtol=1e-8)


def test_trace_scores_are_of_the_dense_hessian() -> None:
    objective, groups = gated()
    diagonal = objective.split(Hessian(objective=objective).matrix().diagonal())
    by_name = dict(zip(objective.names, diagonal, strict=True))
    want = []
    for group in groups:
        masks = entries(objective.model, group, "produced")
        count = sum(float(mask.sum()) for mask in masks.values())
        trace = sum(float((mask * by_name[name]).sum()) for name, mask in masks.items())
        square = sum(float((mask * objective.named[name].detach().square()).sum()) for name, mask in masks.items())
        want.append(trace / count * square / 2)
    found = hessian_trace(LossEvidence(objective), GroupParts(groups, objective.model), probes=1000)
    assert torch.allclose(found, torch.tensor(want, dtype=torch.float64), atol=0.08 * max(map(abs, want)))


def family(name: str) -> Any:
    architecture, configuration, options = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**{**options, "num_hidden_layers": 1})
    return getattr(transformers, architecture)(config).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids).logits
    return result


def tokens(samples: int = 12) -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(5, 500, (samples, 10), generator=torch.Generator().manual_seed(0))
    return [(part, next_tokens(part)) for part in ids.split(4)]


def test_atomic_experts_cost_what_their_own_tokens_say() -> None:
    model = family("mixtral").requires_grad_(True)
    objective = Objective.of(model, CrossEntropy(), tokens(), forward=logits)
    groups = trace_groups(model, tokens()[0][0], logits).sites(("hidden",))[
        "hidden units of model.layers.0.mlp.experts.1"
    ]
    ((reader,),) = find_readers(objective, [groups], 0)
    inputs, labels = sampled(objective)
    linear = with_linear_experts(model)
    layer = linear.get_submodule("model.layers.0.mlp.experts.1.down_proj")
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _, x, y: seen.extend([x[0], y]))
    loss = objective.loss.terms(logits(linear, inputs), labels).sum()
    (gradient,) = torch.autograd.grad(loss, [seen[1]])
    live = gradient.abs().amax(1) > 0  # a last token has no loss after it
    activations, gradient = seen[0].detach()[live], gradient[live]
    terms = int((labels != -100).sum())
    outer = gradient.T @ gradient / terms  # over the expert's own tokens, by their share of all
    weight = layer.weight.detach()
    want = [0.5 * activations[:, k].square().mean() * weight[:, k] @ outer @ weight[:, k] for k in range(len(groups))]
    assert torch.allclose(independent_costs([reader]).float(), torch.stack(want), rtol=1e-3)


def some_readers(columns: Sequence[Sequence[int]]) -> list[Reader]:
    made = []
    for seed, out in ((0, 3), (10, 4)):
        width = 1 + max(max(c) for c in columns)
        half = normal(seed + 1, width + 3, width)
        factor = normal(seed + 2, out, out)
        places = [torch.tensor(c) for c in columns]
        weight = normal(seed, out, width)
        made.append(Reader("w", None, weight, factor @ factor.T, half.T @ half / len(half), places))
    return made


def least_cost(parts: Sequence[Reader], gone: Sequence[int]) -> float:
    """Min ½ tr(G D A Dᵀ) with the columns of `gone` at zero, by the quadratic program's own equations."""
    total = 0.0
    for part in parts:
        gram = part.input_factor + DAMPING * part.input_factor.diagonal().mean() * torch.eye(len(part.input_factor))
        lost = torch.cat([part.columns[g] for g in gone]).tolist()
        kept = [c for c in range(len(gram)) if c not in lost]
        change = -part.weight.clone()
        change[:, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept][:, lost] @ part.weight[:, lost].T).T
        total += float((part.output_factor @ change @ gram @ change.T).trace()) / 2
    return total


@pytest.mark.parametrize("columns", [[[0], [1], [2], [3], [4]], [[0, 1], [2, 3], [4, 5], [6, 7]]], ids=["1", "2"])
def test_the_surgeon_removes_what_brute_force_does(columns: list[list[int]]) -> None:
    parts = some_readers(columns)
    order, costs = greedy_removal(parts, len(columns) - 1)
    for number in range(1, len(columns)):
        assert sum(costs[:number]) == pytest.approx(least_cost(parts, order[:number]), rel=1e-8)
        nexts = [
            least_cost(parts, [*order[: number - 1], g]) for g in range(len(columns)) if g not in order[: number - 1]
        ]
        assert least_cost(parts, order[:number]) == pytest.approx(min(nexts), rel=1e-8)
    best_pair = min(combinations(range(len(columns)), 2), key=lambda pair: least_cost(parts, pair))
    assert sum(costs[:2]) <= 1.5 * least_cost(parts, best_pair)
    part = parts[0]
    moved = fitted_weight(part, order[:2]) - part.weight
    gram = part.input_factor + DAMPING * part.input_factor.diagonal().mean() * torch.eye(len(part.input_factor))
    kept = [c for g in order[2:] + [g for g in range(len(columns)) if g not in order] for c in columns[g]]
    assert (moved @ gram)[:, kept].abs().max() < 1e-9  # no better values of what is left


def test_budgets_are_shares_of_sites_or_of_all() -> None:
    group = Group("hidden", "a", 0, (), ())
    cheap = Ranking("a", [group] * 10, [float(i) for i in range(10)], 3, 9)
    dear = Ranking("b", [group] * 20, [100.0 + i for i in range(20)], 3, 18)
    assert uniform_numbers([cheap, dear], 0.25) == [2, 5]
    assert shared_numbers([cheap, dear], 0.2) == [6, 0]
    assert shared_numbers([cheap, dear], 0.5) == [9, 6]
    with pytest.raises(OptionError, match="more than may be removed"):
        shared_numbers([cheap, dear], 0.95)


def pruned(model: nn.Module, data: Any, what: Any = "groups", **options: Any) -> tuple[Any, PruneReport]:
    result = hesse.prune(model, data=data, what=what, **options)
    assert result.model is not None
    return result.model, result.report


def value(model: nn.Module, data: digits.Batches) -> float:
    return Objective.of(model, CrossEntropy(), data).value()


def test_what_scores_call_unimportant_costs_less_than_chance_and_a_refit_least() -> None:
    model, data = digits.trained("conv"), digits.batches(samples=320)
    losses = {}
    for method in ("random", "magnitude", "heapr", "obs"):
        smaller, report = pruned(model, data, method=method, keep=0.75)
        assert report.difference < 1e-5
        assert report.parameters_after < 0.65 * report.parameters_before
        assert report.flops_after < 0.7 * report.flops_before
        assert report.loss_after == pytest.approx(value(smaller, data), rel=1e-5)
        losses[method] = report.loss_after - report.loss_before
        assert all(gone == round(0.25 * there) for gone, there in report.removed.values())
    assert losses["obs"] < 0.2 * min(losses["heapr"], losses["magnitude"])
    assert losses["heapr"] < losses["random"]
    assert digits.accuracy(smaller) > digits.accuracy(model) - 0.05


def test_one_ranking_over_all_sites_differs_by_site() -> None:
    _, report = pruned(digits.trained("conv"), digits.batches(samples=128), keep=0.7, scope="network", least=0.5)
    shares = {gone / there for gone, there in report.removed.values()}
    assert len(shares) > 1
    assert max(shares) <= 0.5


@pytest.mark.parametrize(("net", "method"), [("conv", "pagcp"), ("vit", "axformer")])
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.5])
def test_the_tolerance_is_kept(tolerance: float, net: str, method: str) -> None:
    data = digits.batches(samples=320)
    options = {"keep": 0.2} if method == "pagcp" else {}
    _, report = pruned(digits.trained(net), data, method=method, loss=tolerance, **options)
    assert report.loss_after <= report.loss_before + tolerance + 1e-5
    assert report.difference < 1e-5
    assert sum(gone for gone, _ in report.removed.values()) > (0 if tolerance == 0.5 else -1)


def slow_hierarchy(model: nn.Module, data: digits.Batches, tolerance: float) -> tuple[nn.Module, set[str]]:
    """The algorithm as it is written, on copies: the model with what goes at zero, and the names of that."""
    sites = trace_groups(model, data[0][0]).sites()

    def zeroed(groups: Sequence[Group]) -> nn.Module:
        copy = deepcopy(model)
        zero_groups(copy, groups)
        return copy

    def weight(group: Group) -> float:
        known = dict(now.named_parameters())
        total = 0.0
        for piece in group.slices:
            rest = known[piece.parameter].detach().clone()
            piece.fill(rest, 0)
            total += float((known[piece.parameter].detach() - rest).square().sum())
        return total

    dense, gone = value(model, data), list[Group]()
    for level in ("sites", "heads", "hidden"):
        now, elements = zeroed(gone), list[list[Group]]()
        for groups in sites.values():
            left = [group for group in groups if group not in gone]
            if level == "sites":
                elements.append(left)
            elif level == "heads" == groups[0].kind:
                elements += [[group] for group in left]
            elif level == "hidden" == groups[0].kind and left:
                left, size = sorted(left, key=weight), max(len(left) // 8, 1)
                elements += [left[start : start + size] for start in range(0, len(left), size)]
        for element in sorted(elements, key=lambda element: value(zeroed([*gone, *element]), data)):
            if value(zeroed([*gone, *element]), data) <= dense + tolerance:
                gone = [*gone, *element]
    return zeroed(gone), {group.name for group in gone}


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.6])
def test_the_hierarchy_is_as_written_and_sliced_is_zeroed(tolerance: float) -> None:
    model, data = digits.trained("vit").double(), [(x.double(), y) for x, y in digits.batches(samples=96)]
    want, names = slow_hierarchy(model, data, tolerance)
    objective = Objective.of(deepcopy(model), CrossEntropy(), data)
    sites = trace_groups(model, data[0][0]).sites()
    gone = Hierarchy(tolerance).zeroed(Sites(objective, sites))
    assert {group.name for groups in gone.values() for group in groups} == names
    smaller, report = pruned(model, data, method="axformer", loss=tolerance)
    with torch.no_grad():
        assert torch.allclose(smaller(data[0][0]), want(data[0][0]), atol=1e-10)
    assert {site: lost for site, (lost, _) in report.removed.items()} == {
        site: min(len(gone[site]), len(groups) - 1) for site, groups in sites.items()
    }


def test_a_part_that_does_harm_goes_whole_and_one_unit_at_zero_stays() -> None:
    model, data = digits.trained("vit"), digits.batches(samples=192)
    with torch.no_grad():
        model.get_submodule("blocks.1.down").weight.mul_(-4)  # type: ignore[operator, union-attr]
    smaller, report = pruned(model, data, method="axformer", loss=0.0)
    harmful = next(site for site in report.removed if "blocks.1.up" in site)
    assert report.removed[harmful] == (63, 64)
    assert report.loss_after < report.loss_before
    up = smaller.get_submodule("blocks.1.up")
    assert up.weight.shape == (1, 32)  # type: ignore[union-attr]
    assert not up.weight.any()  # type: ignore[operator, union-attr]
    assert not up.bias.any()  # type: ignore[operator, union-attr]


def test_an_implant_of_full_rank_changes_nothing() -> None:
    model, data = digits.trained("mlp").double(), [(x.double(), y) for x, y in digits.batches(samples=192)]
    options: dict[str, Any] = {"method": "hap", "keep": 0.9, "least": 0.5}
    plain, before = pruned(model, data, **options)
    full, _ = pruned(model, data, **options, implant=Implant(0.3, 1000))
    narrow, after = pruned(model, data, **options, implant=Implant(0.3, 2))
    images = data[0][0]
    with torch.no_grad():
        assert torch.allclose(full(images), plain(images), atol=1e-8)
        assert (narrow(images) - plain(images)).abs().max() > 1e-3
    assert after.parameters_after < before.parameters_after


@pytest.mark.parametrize("rank", [3, 7])
def test_convolutions_take_implants(rank: int) -> None:
    model, data = digits.trained("conv").double(), [(x.double(), y) for x, y in digits.batches(samples=64)]
    images, rows = data[0][0], {"block1.conv1": [0, 3, 5, 9, 10, 11, 15], "block2.shortcut": list(range(0, 28, 4))}
    with torch.no_grad():
        before = model(images)
    implant(Objective.of(model, CrossEntropy(), data), rows, rank)
    with torch.no_grad():
        assert ((model(images) - before).abs().max() < 1e-9) == (rank == 7)
    assert isinstance(model.block1.conv1, ImplantedLayer)


def test_a_half_space_step_is_as_written() -> None:
    objective, groups = gated()
    model, rate, penalty, margin = objective.model, 0.3, 0.6, 0.4
    sums = GroupParts(groups, model, "produced")
    optimizer = HalfSpace(list(model.named_parameters()), sums, rate, penalty, margin, warmup=1)
    (inputs, targets), *_ = objective.batches()
    gone: set[int] = set()
    for step in range(4):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        gradients = dict(zip(objective.names, torch.autograd.grad(loss, objective.parameters), strict=True))
        want = {name: p.detach() - rate * gradients[name] for name, p in model.named_parameters()}
        for number, group in enumerate(groups):
            masks = entries(model, group, "produced")
            old = torch.cat([p.detach()[masks[n] > 0] for n, p in model.named_parameters() if n in masks])
            for name, mask in masks.items():
                want[name] = want[name] - rate * penalty * mask * model.get_parameter(name).detach() / old.norm().clamp(
                    min=1e-12
                )
            trial = torch.cat([want[n][masks[n] > 0] for n, _ in model.named_parameters() if n in masks])
            if number in gone or (step >= 1 and float(trial @ old) < margin * float(old @ old)):
                gone.add(number)
                for name, mask in masks.items():
                    want[name] = want[name] * (1 - mask)
        optimizer.zero_grad()
        for name, gradient in gradients.items():
            model.get_parameter(name).grad = gradient
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter.detach(), want[name], atol=1e-12)
    assert 0 < len(gone) < len(groups)
    assert set(torch.nonzero(optimizer.zeroed).flatten().tolist()) == gone


def test_training_once_leaves_zero_groups_that_are_cut_with_the_outputs_unchanged() -> None:
    model, data = digits.trained("mlp"), digits.batches()
    smaller, report = pruned(model, data, method="only-train-once", steps=300, rate=0.2, penalty=0.03)
    assert report.difference < 1e-5
    assert report.parameters_after < 0.9 * report.parameters_before
    assert digits.accuracy(smaller) > 0.9
    assert digits.accuracy(model) > 0.9  # it stays as it was


@pytest.mark.parametrize(("name", "kinds"), [("mixtral", ["hidden"]), ("qwen2-moe", ["experts"]), ("gpt2", None)])
def test_language_models_of_all_kinds_are_pruned(name: str, kinds: list[str] | None) -> None:
    model, method = family(name), "fisher" if kinds == ["experts"] else "obs"
    smaller, report = pruned(model, tokens(), what=kinds or "groups", method=method, keep=0.66, forward=logits)
    assert report.parameters_after < report.parameters_before
    assert report.difference < 1e-4
    assert report.flops_after < report.flops_before or kinds == ["experts"]  # as many are chosen as before
    assert (report.loading is None) == (kinds is not None)
    assert logits(smaller, tokens()[0][0]).shape == (4, 10, 512)


def test_zeroed_groups_are_what_the_report_measures() -> None:
    model, data = digits.trained("mlp"), digits.batches(samples=128)
    smaller, _ = pruned(model, data, method="magnitude", keep=0.5)
    groups = trace_groups(model, data[0][0]).groups
    weights = StoredWeights({name: p.detach() for name, p in model.named_parameters()})
    sizes = find_score("magnitude").costs(weights, GroupParts(groups, model))
    sites = {group.site for group in groups}
    lost = []
    for site in sites:
        places = [i for i, group in enumerate(groups) if group.site == site]
        lost += sorted(places, key=lambda i: float(sizes[i]))[: len(places) // 2]
    zero_groups(model, [groups[i] for i in lost])
    with torch.no_grad():
        assert torch.allclose(model(data[0][0]), smaller(data[0][0]), atol=1e-5)


@pytest.mark.parametrize("name", [name for name, row in methods_of("prune").items() if row.family == "structured"])
def test_every_row_runs_from_its_entry(name: str) -> None:
    row = METHODS[name]
    options: dict[str, Any] = {"loss": 0.1} if row.solver in ("site_tolerance", "hierarchy") else {}
    options |= {"steps": 20} if name == "only-train-once" else {}
    result = row.run(digits.trained("mlp"), data=digits.batches(samples=64), **options)
    assert result.model is not None
    assert result.report.method == name
    assert result.report.difference < 1e-5
    assert (row.score is None) == (row.solver != "group_ranking")
    assert {option.name for option in row.options()} == set(result.report.settings) - {"score"}
    assert result.report.to_dict()["verb"] == "prune"


@pytest.mark.parametrize("score", [score.name for score in SCORES.values() if "channels" in score.parts])
def test_every_score_of_groups_prunes_them(score: str) -> None:
    model, data = digits.trained("conv").double(), [(x.double(), y) for x, y in digits.batches(samples=48)]
    smaller, report = pruned(model, data, what="channels", method=score, keep=0.8)
    assert report.parameters_after < report.parameters_before
    assert report.loss is not None
    assert (report.loss.predicted is not None) == SCORES[score].nats
    assert smaller(data[0][0]).isfinite().all()


def test_scores_of_groups_are_their_definitions() -> None:
    objective, groups = gated()
    inputs, targets = (torch.cat(parts) for parts in zip(*objective.batches(), strict=True))
    weight = objective.named["down.weight"]
    loss = nn.functional.cross_entropy(objective.outputs(inputs), targets)
    (gradient,) = torch.autograd.grad(loss, [weight])
    assert torch.allclose(costs("gradient", objective, groups), (gradient * weight).sum(0).abs().detach(), rtol=1e-8)
    restricted = Objective(objective.model, objective.loss, objective.data, ("down.weight",), None)
    flat = weight.detach().flatten()
    products = (flat * (Hessian(objective=restricted).matrix() @ flat)).view(weight.shape)
    assert torch.allclose(costs("oba", objective, groups), products.sum(0).abs(), rtol=1e-6)
    fisher = torch.zeros_like(weight)
    for x, y in zip(*(part.split(1) for part in sampled(objective)), strict=True):
        loss = objective.loss.terms(objective.outputs(x), y).sum()
        fisher += torch.autograd.grad(loss, [weight])[0].square() / len(inputs)
    assert torch.allclose(costs("obd", objective, groups), 0.5 * (fisher * weight.detach().square()).sum(0), rtol=1e-6)
    dense = objective.value()
    for number, group in enumerate(groups):
        copy = deepcopy(objective.model)
        zero_groups(copy, [group])
        rise = Objective.of(copy, CrossEntropy(), list(objective.data)).value() - dense
        assert float(costs("loss", objective, groups)[number]) == pytest.approx(rise, rel=1e-8)
    assert objective.value() == dense


def test_the_surgeons_first_costs_are_those_of_each_group_alone() -> None:
    parts = some_readers([[0, 1], [2, 3], [4, 5], [6, 7]])
    assert removal_costs(parts).tolist() == pytest.approx([least_cost(parts, [group]) for group in range(4)], rel=1e-8)


def test_a_score_of_ones_own_prunes_and_is_in_the_table() -> None:
    model, data = digits.trained("mlp"), digits.batches(samples=64)

    @register_score("cubes", source="this test", parts=(*GROUP_KINDS, "groups", "weights"))
    def cubes(evidence: LossEvidence, partition: Any) -> Tensor:
        """The sum of |w|³ over a part."""
        return partition.sums({name: weight.abs() ** 3 for name, weight in evidence.weights(partition).items()})

    try:
        assert SCORES["cubes"].help == "The sum of |w|³ over a part."
        _, report = pruned(model, data, method="cubes", keep=0.5)
        assert all(removed == round(0.5 * there) for removed, there in report.removed.values())
        zeros = hesse.prune(model, data=data, what="weights", method="cubes", sparsity=0.3).report
        other = hesse.prune(model, data=data, what="weights", method="magnitude", sparsity=0.3).report
        assert zeros.loss_after == other.loss_after  # the same order of single weights
        with pytest.raises(OptionError, match="there is already a score 'cubes'"):
            register_score("cubes", source="this test")(cubes)
    finally:
        del SCORES._entries["cubes"]
    with pytest.raises(OptionError, match="there is no method 'cubes' that prunes groups"):
        pruned(model, data, method="cubes")


def test_bad_input_is_refused_before_any_work() -> None:
    calls: list[int] = []

    def counting(model: nn.Module, values: Tensor) -> Tensor:
        calls.append(1)
        result: Tensor = model(values)
        return result

    model, data = digits.trained("mlp"), digits.batches(samples=64)
    for options, message in (
        ({"method": "best"}, "there is no method 'best' that prunes groups; there are random, magnitude"),
        ({"keep": 1.2}, r"keep is 1\.2"),
        ({"least": 1.0}, r"least 1\.0"),
        ({"scope": "row"}, "the scope is 'site' or 'network'"),
        ({"refit": "all"}, "refit is 'least-squares' or 'none'"),
        ({"method": "pagcp"}, "pagcp needs a tolerance: give loss="),
        ({"method": "obs", "loss": 0.1}, "the method obs has no option 'loss'; it has keep, scope"),
        ({"method": "obs", "implant": Implant(0.1, 2)}, "an implant goes with the method hap"),
        ({"method": "obs", "what": "experts"}, "obs judges a group by what reads it, not experts"),
        ({"method": "mad"}, "the score mad judges weights"),
        ({"method": "fisher", "what": ["experts", "hidden"]}, "prune in two calls"),
        ({"method": "fisher", "what": "experts", "refit": "least-squares"}, "an expert has its router there"),
        ({"method": "pagcp", "loss": 0.1, "refit": "least-squares"}, "the method pagcp has no option 'refit'"),
        ({"method": "axformer"}, "axformer needs a tolerance"),
        ({"method": "axformer", "loss": -0.1}, r"loss is -0\.1"),
        ({"method": "axformer", "loss": 0.1, "keep": 0.5}, "the method axformer has no option 'keep'"),
        ({"method": "axformer", "loss": 0.1, "least": 0.5}, "the method axformer has no option 'least'"),
        ({"method": "axformer", "loss": 0.1, "what": "experts"}, "axformer sets groups to zero"),
        ({"method": "only-train-once", "warmup": 2.0}, r"warmup is 2\.0"),
        ({"method": "only-train-once", "what": ["experts"]}, "still chosen"),
        ({"what": "layers"}, "there are no layers to prune"),
        ({"what": "blocks"}, "blocks are pruned on disk"),
        ({"what": ["weights", "heads"]}, "cannot be pruned in one call"),
        ({"layers": ("0",)}, "layers and ignore choose weights"),
    ):
        with pytest.raises(OptionError, match=message):
            pruned(model, data, forward=counting, **options)  # type: ignore[arg-type]
    assert not calls
    with pytest.raises(OptionError, match="no heads"):
        pruned(model, data, forward=counting, what="heads")
    assert len(calls) == 1  # it was traced, and no more
    untraceable = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LSTM(8, 8))
    with pytest.raises(UnsupportedModelError, match="the groups of 2 cannot be traced"):
        pruned(untraceable, data)
    with pytest.raises(OptionError, match="an implant of share 2"):
        Implant(2, 1)
