"""Scores of any parts of a network's parameters: weights, tiles, rows, heads, hidden units, channels, experts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hesse.curvature import Hessian, Kronecker, Objective, RankOneSum
from hesse.errors import OptionError
from hesse.estimation import estimate_curvatures
from hesse.partitions import Partition
from hesse.passes.per_sample import GradientPass
from hesse.passes.sample_gradients import sample_gradients
from hesse.scores.evidence import LossEvidence, StoredWeights
from hesse.scores.score import BLOCKS, GROUPS, PARAMETERS, WEIGHTS, Score, add_score, register_score

PROBES = 32  # random vectors for the trace of the Hessian
AnyWeights = StoredWeights | LossEvidence


@register_score("random", source="the floor of every comparison")
def random(evidence: AnyWeights, partition: Partition) -> Tensor:
    """Uniform between 0 and 1, by the seed: the floor of every table."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(partition.count, generator=generator, dtype=partition.precision)


@register_score(
    "magnitude",
    source="Han et al., 2015, arXiv:1506.02626; of groups Li et al., 2017, arXiv:1608.08710",
    uses="identity",
)
def magnitude(evidence: AnyWeights, partition: Partition) -> Tensor:
    """Σ w² over the part; of a group, over all weights that go with it, those that read it too."""
    return partition.sums({name: weight.square() for name, weight in evidence.weights(partition).items()})


@register_score("lamp", source="LAMP, Lee et al., 2021, arXiv:2010.07611", parts=WEIGHTS)
def lamp(evidence: AnyWeights, partition: Partition) -> Tensor:
    """w_u² / Σ w_v² over the weights v of the layer that are as large or larger.

    The largest weight of each layer has the score 1, so that no layer is emptied.
    """
    return partition.sums({name: _share_of_larger(weight) for name, weight in evidence.weights(partition).items()})


def _share_of_larger(weight: Tensor) -> Tensor:
    squares, order = weight.double().square().flatten().sort()
    rest = squares.flip(0).cumsum(0).flip(0)
    shares = torch.where(rest > 0, squares / rest, torch.zeros_like(rest)).float()
    return torch.empty_like(shares).scatter_(0, order, shares).view(weight.shape)


@register_score("gradient", source="|w g|, Molchanov et al., 2019, arXiv:1906.10771")
def gradient(evidence: LossEvidence, partition: Partition) -> Tensor:
    """|g·w|, g the gradient of the loss on all data: the first order's value of a removal."""
    return _sums_of_products(evidence, partition, Objective.gradient)


@register_score("taylor", source="Molchanov et al., 2019, arXiv:1906.10771")
def taylor(evidence: LossEvidence, partition: Partition) -> Tensor:
    """(g·w)² of each batch's mean loss, averaged over batches; of a group, over its outgoing weights."""
    outgoing = partition.restricted("outgoing")
    objective, known = evidence.objective, dict(evidence.objective.model.named_parameters())
    parameters = {name: known[name] for name in outgoing.shapes}
    squares = []
    for inputs, targets in objective.batches():
        loss = objective.loss.terms(objective.outputs(inputs), targets).sum() / objective.count(inputs, targets)
        slopes = torch.autograd.grad(loss, tuple(parameters.values()), allow_unused=True, materialize_grads=True)
        pairs = zip(parameters.items(), slopes, strict=True)
        squares.append(outgoing.sums({name: outgoing.exact(g * p.detach()) for (name, p), g in pairs}).square())
    return torch.stack(squares).mean(0)


@register_score("oba", source="Optimal Brain Apoptosis, Sun et al., 2025, arXiv:2502.17941", uses="hessian")
def apoptosis(evidence: LossEvidence, partition: Partition) -> Tensor:
    """|w·(Hw)| over the part, H the exact Hessian: the part's own share of the second order, ½ wᵀHw doubled.

    As automatic differentiation has it; of a group, w are the outgoing weights of all groups.
    """
    return _sums_of_products(evidence, partition, _hessian_product)


def _hessian_product(objective: Objective) -> Tensor:
    flat = objective.join([parameter.detach() for parameter in objective.parameters])
    return Hessian(objective=objective).matvec(flat)


def _sums_of_products(evidence: LossEvidence, partition: Partition, vector: Callable[[Objective], Tensor]) -> Tensor:
    """Return the size of the sum over each part of its weights times their entries of a vector."""
    outgoing = partition.restricted("outgoing")
    objective = evidence.on(outgoing)
    factors = _by_name(objective, vector(objective))
    return outgoing.sums({name: weight * factors[name] for name, weight in evidence.weights(outgoing).items()}).abs()


@register_score(
    "obd",
    source="Optimal Brain Damage, LeCun et al., 1989, with the true Fisher's diagonal",
    nats=True,
    uses="fisher_diagonal",
)
def damage(evidence: LossEvidence, partition: Partition) -> Tensor:
    """½ Σ w² F_ii, F the Fisher of whole samples; of a group, over its outgoing weights."""
    outgoing = partition.restricted("outgoing")
    objective, weights = evidence.on(outgoing), evidence.weights(outgoing)
    fisher = estimate_curvatures(objective, ["fisher"], evidence.kind, "sample", seed=evidence.seed).fisher
    return outgoing.sums({name: 0.5 * weight.square() * fisher[name].values for name, weight in weights.items()})


@register_score(
    "fisher",
    source="½ wᵀFw of each part's weights, the second order of its removal",
    nats=True,
    uses="fisher_gradients",
)
def fisher(evidence: LossEvidence, partition: Partition) -> Tensor:
    """½ wᵀFw, w the part's weights, or a group's outgoing ones, and F the Fisher of whole samples, in float64.

    It is ½ E[(g·w)²], g the gradient of a sample's summed loss.
    """
    outgoing = partition.restricted("outgoing")
    objective = evidence.on(outgoing)
    gradients = GradientPass(objective, evidence.kind, seed=evidence.seed)
    total = torch.zeros(outgoing.count, dtype=torch.float64)
    for passage in gradients:
        products = torch.zeros(passage.samples, outgoing.count, dtype=torch.float64)
        for name, parameter in objective.named.items():
            pieces = list(sample_gradients(passage, name, gradients.parts[name], parameter))
            if pieces:
                slopes = torch.cat(pieces) * parameter.detach()
                products += outgoing.sums_of_samples({name: slopes}).double().cpu()
        total += products.square().sum(0)
    return total * gradients.scale / 2


class MatrixFreeSurgeon(Score):
    """w² / 2[F⁻¹]_ii with F = λI + 1/m Σ g gᵀ over all weights jointly: the cost with the best values of all others."""

    def cost(self, evidence: LossEvidence, partition: Partition) -> Tensor:
        if tuple(partition.shapes) != evidence.objective.names:
            raise OptionError(f"{self.name} judges all parameters of the objective at once, not some of them")
        weights = partition.sums(evidence.weights(partition))
        return weights.square() / (2 * evidence.fisher_gradients.inverse_diagonal())

    def curvature(self, evidence: LossEvidence) -> RankOneSum:
        return evidence.fisher_gradients


add_score(
    MatrixFreeSurgeon(
        name="m-fac-network",
        source="M-FAC, Frantar, Kurtic and Alistarh, 2021, arXiv:2107.03356, over all layers at once",
        parts=WEIGHTS,
        uses="fisher_gradients",
        nats=True,
    )
)


@register_score(
    "hap", source="HAP, Yu et al., 2022, arXiv:2101.08940, whose official code has no ½", nats=True, uses="hessian"
)
def hessian_trace(evidence: LossEvidence, partition: Partition, probes: int = PROBES) -> Tensor:
    """½ tr(H_c) / p_c · ‖w_c‖², c what makes the part: p_c weights, and their block of the Hessian, in float64.

    The trace is Hutchinson's estimate from `probes` vectors of random signs.
    """
    produced = partition.restricted("produced")
    objective = evidence.on(produced)
    hessian, generator = Hessian(objective=objective, keep_graph=True), torch.Generator().manual_seed(evidence.seed)
    diagonal = torch.zeros(objective.size, dtype=torch.float64)
    for _ in range(probes):
        signs = (2 * torch.randint(0, 2, (objective.size,), generator=generator) - 1).to(objective.parameters[0])
        diagonal += (signs * hessian.matvec(signs)).double().cpu() / probes
    squares = produced.sums({name: w.double().square().cpu() for name, w in evidence.weights(produced).items()})
    return produced.sums(_by_name(objective, diagonal)) / produced.sizes() * squares / 2


@register_score(
    "mad",
    source="Masking Adversarial Damage, Lee et al., 2022, arXiv:2204.02738, for whole removals",
    parts=PARAMETERS,
    uses="kronecker",
)
def adversarial_damage(evidence: LossEvidence, partition: Partition) -> Tensor:
    """|½ Σ w_ij G_ii (W A)_ij| over the part, with K-FAC's factors G, A of the loss on attacked inputs, per position.

    The change is that of a removal, dw = -w; the paper takes that of a soft mask, fitted to each batch first. A
    weight's term may be negative; a row's sum is not.

    Raises:
        OptionError: no attack is given.
    """
    objective = replace(evidence.on(partition), data=evidence.attacked)
    factors = estimate_curvatures(objective, ["kronecker"], "empirical", seed=evidence.seed).kronecker
    terms = {}
    for name, weight in evidence.weights(partition).items():
        factor = factors[name]
        assert isinstance(factor, Kronecker)
        outputs, inputs = factor.output_factor.diagonal(), factor.input_factor.to(weight)
        matrix = weight.T if factor.transposed else weight.flatten(1)
        term = 0.5 * matrix * outputs[:, None].to(weight) * (matrix @ inputs)
        terms[name] = (term.T if factor.transposed else term).reshape(weight.shape)
    return partition.sums(terms).abs()


class Measures(Protocol):
    """Evidence that measures the loss without parts."""

    def measured(self, partition: Partition) -> Tensor:
        """Return by how much the loss rises without each part alone (parts,)."""


@register_score(
    "loss",
    source="AxFormer, Nagarajan et al., 2020, arXiv:2010.03688, and others",
    parts=(*PARAMETERS[1:], *GROUPS, *BLOCKS),
    nats=True,
)
def measured_loss(evidence: Measures, partition: Partition) -> Tensor:
    """The measured increase of the loss without the part: one run over the data a part."""
    return evidence.measured(partition)


def _by_name(objective: Objective, flat: Tensor) -> dict[str, Tensor]:
    """A vector over all parameters of an objective as one tensor for each."""
    return dict(zip(objective.names, objective.split(flat), strict=True))
