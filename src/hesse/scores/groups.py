"""What taking out each group costs: scores that judge groups one by one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.curvature import Hessian, Objective
from hesse.partitions import Group
from hesse.passes.per_sample import GradientPass
from hesse.passes.sample_gradients import sample_gradients
from hesse.scores.group_sums import GroupSums, everything, outgoing, produced


def random_scores(objective: Objective, groups: Sequence[Group], seed: int) -> Tensor:
    """Uniform between 0 and 1: the floor."""
    return torch.rand(len(groups), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def magnitudes(objective: Objective, groups: Sequence[Group], seed: int) -> Tensor:
    """Σ w² over all weights that go with a group, those that read it too."""
    sums = GroupSums.over(groups, objective.model, everything)
    return sums.of({name: p.detach().double().square() for name, p in _parameters(objective, sums).items()}).cpu()


def taylor_scores(objective: Objective, groups: Sequence[Group], seed: int) -> Tensor:
    """(g·w)² of each batch's mean loss, averaged over batches. Source: Molchanov et al., 2019, arXiv:1906.10771."""
    sums = GroupSums.over(groups, objective.model, outgoing)
    parameters = _parameters(objective, sums)
    found = []
    for inputs, targets in objective.batches():
        loss = objective.loss.terms(objective.outputs(inputs), targets).sum() / objective.count(inputs, targets)
        gradients = torch.autograd.grad(loss, tuple(parameters.values()), allow_unused=True, materialize_grads=True)
        products = {name: (g * p.detach()).double() for (name, p), g in zip(parameters.items(), gradients, strict=True)}
        found.append(sums.of(products).square())
    return torch.stack(found).mean(0).cpu()


def fisher_scores(objective: Objective, groups: Sequence[Group], seed: int) -> Tensor:
    """½ wᵀFw in nats, w a group's outgoing weights and F the true Fisher of whole samples, with sampled labels.

    It is ½ E[(g·w)²], g the gradient of a sample's summed loss.
    """
    sums = GroupSums.over(groups, objective.model, outgoing)
    chosen = Objective(objective.model, objective.loss, objective.data, tuple(sums.names), objective.forward)
    walk = GradientPass(chosen, "sampled", seed=seed)
    total = torch.zeros(len(groups), dtype=torch.float64)
    for passage in walk:
        products = torch.zeros(passage.samples, len(groups), dtype=torch.float64)
        for name, parameter in chosen.named.items():
            pieces = list(sample_gradients(passage, name, walk.parts[name], parameter))
            if pieces:
                gradients = torch.cat(pieces) * parameter.detach()
                products += sums.of_samples({name: gradients}).double().cpu()
        total += products.square().sum(0)
    return total * walk.scale / 2


def trace_scores(objective: Objective, groups: Sequence[Group], seed: int, probes: int = 32) -> Tensor:
    """½ tr(H_c) / p_c · ‖w_c‖², c what makes a group: p_c weights, and their block of the Hessian of the loss.

    The trace is Hutchinson's estimate from random signs. Source: HAP (Yu et al., 2022, arXiv:2101.08940), whose
    official code has no ½.
    """
    sums = GroupSums.over(groups, objective.model, produced)
    parameters = _parameters(objective, sums)
    chosen = Objective(objective.model, objective.loss, objective.data, tuple(parameters), objective.forward)
    hessian, generator = Hessian(objective=chosen, keep_graph=True), torch.Generator().manual_seed(seed)
    diagonal = torch.zeros(chosen.size, dtype=torch.float64)
    for _ in range(probes):
        signs = (2 * torch.randint(0, 2, (chosen.size,), generator=generator) - 1).to(chosen.parameters[0])
        diagonal += (signs * hessian.matvec(signs)).double().cpu() / probes
    traces = sums.of(dict(zip(chosen.names, chosen.split(diagonal), strict=True)))
    counts = sums.of({name: torch.ones(p.shape, dtype=torch.float64) for name, p in parameters.items()})
    squares = sums.of({name: p.detach().double().square().cpu() for name, p in parameters.items()})
    return traces / counts * squares / 2


def _parameters(objective: Objective, sums: GroupSums) -> dict[str, torch.nn.Parameter]:
    known = dict(objective.model.named_parameters())
    return {name: known[name] for name in sums.names}
