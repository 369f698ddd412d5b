"""What each weight of a network is worth: one function a score, all layers' weights as one vector."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesse.curvature import Hessian, Kronecker, Objective, RankOneSum
from hesse.errors import OptionError
from hesse.estimation import estimate_curvatures
from hesse.estimation.walk import Kind
from hesse.modules.attack import Attack

DAMPING = 1e-4  # of M-FAC's sum, as a share of its mean eigenvalue in the span of the gradients


@dataclass(frozen=True)
class ScoreOptions:
    """What scores may depend on besides the loss."""

    kind: Kind = "sampled"
    seed: int = 0
    attack: Attack | None = None


@dataclass(frozen=True, eq=False)
class Judgement:
    """Of all weights as one vector: the lowest scores go first."""

    scores: Tensor  # (size,)
    curvature: RankOneSum | None = None  # under which those that stay make the loss good


def magnitude(objective: Objective, options: ScoreOptions) -> Judgement:
    """w²."""
    return Judgement(weights_of(objective).square())


def random(objective: Objective, options: ScoreOptions) -> Judgement:
    """Nothing: the floor of every table."""
    drawn = torch.rand(objective.size, generator=torch.Generator().manual_seed(options.seed))
    return Judgement(drawn.to(weights_of(objective)))


def gradient(objective: Objective, options: ScoreOptions) -> Judgement:
    """|w ⊙ g|, g the gradient of the loss: what the first order says of a removal (Molchanov et al., 2019)."""
    return Judgement((weights_of(objective) * objective.gradient()).abs())


def apoptosis(objective: Objective, options: ScoreOptions) -> Judgement:
    """|w ⊙ (Hw)|, H the exact Hessian on these weights: each one's row of the second order, ½ wᵀHw doubled.

    Optimal Brain Apoptosis (Sun et al., 2025), as automatic differentiation has it.
    """
    weights = weights_of(objective)
    return Judgement((weights * Hessian(objective=objective).matvec(weights)).abs())


def damage(objective: Objective, options: ScoreOptions) -> Judgement:
    """½ w² F_ii, F the Fisher, of whole samples: Optimal Brain Damage (LeCun et al., 1989)."""
    found = estimate_curvatures(objective, ["fisher"], options.kind, "sample", seed=options.seed).fisher
    diagonal = objective.join([found[name].values for name in objective.names])
    return Judgement(0.5 * weights_of(objective).square() * diagonal)


def matrix_free(objective: Objective, options: ScoreOptions) -> Judgement:
    """w² / 2[F⁻¹]_ii with F = λI + 1/m Σ g gᵀ over all weights at once: M-FAC (Frantar et al., 2021)."""
    found = estimate_curvatures(objective, ["rank-one"], options.kind, "sample", seed=options.seed).rank_one
    assert found is not None
    curvature = found.damped(DAMPING, of="range")
    return Judgement(weights_of(objective).square() / (2 * curvature.inverse_diagonal()), curvature)


def adversarial(objective: Objective, options: ScoreOptions) -> Judgement:
    """½ w_ij G_ii (W A)_ij, with K-FAC's factors G, A of the loss on attacked inputs, per position.

    Masking Adversarial Damage (Lee et al., 2022) with the change that removal is, dw = -w; the paper takes that of a
    soft mask, fitted to each batch first. A score may be negative; a row's sum is not.

    Raises:
        OptionError: no attack is given.
    """
    if options.attack is None:
        raise OptionError("the score mad needs attacked inputs: give attack=hesse.modules.Attack(radius=...)")
    attacked = replace(objective, data=options.attack.on(objective))
    factors = estimate_curvatures(attacked, ["kronecker"], "empirical", seed=options.seed).kronecker
    pieces = []
    for name, weight in objective.named.items():
        factor = factors[name]
        assert isinstance(factor, Kronecker)
        outputs, inputs = factor.output_factor.diagonal(), factor.input_factor.to(weight)
        matrix = weight.detach().T if factor.transposed else weight.detach().flatten(1)
        score = 0.5 * matrix * outputs[:, None].to(weight) * (matrix @ inputs)
        pieces.append((score.T if factor.transposed else score).reshape(weight.shape))
    return Judgement(objective.join(pieces).abs())


SCORES: dict[str, Callable[[Objective, ScoreOptions], Judgement]] = {
    "random": random,
    "magnitude": magnitude,
    "gradient": gradient,
    "oba": apoptosis,
    "obd": damage,
    "m-fac-network": matrix_free,
    "mad": adversarial,
}


def weights_of(objective: Objective) -> Tensor:
    """The objective's parameters as one vector (size,)."""
    return objective.join([parameter.detach() for parameter in objective.parameters])
