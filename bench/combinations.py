"""Parts that no other program joins, against the best single method at as many bits a weight.

    python bench/combinations.py [--samples 64] [--bits 2.5,3.2]

One curvature, that of the end loss, under all: zeros and codes at once; codes with a few weights kept as they are, or
with a low rank beside them; and one plan that gives each layer whichever of these, and how many bits, costs the least.
Prints Markdown: KL(dense || compressed) in nats per token on held-out text, the predicted loss, and bits a weight as
the constraints count them (scales, masks, columns of outliers and factors included).
"""

import argparse
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from machine import limits
from methods import asked, stored_dtype
from run import LENGTH, SAMPLES

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.estimation import Statistics
from hesse.formats import open_checkpoint
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, effect
from hesse.methods import Recipe, Rule
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import GridOptions, LowRankOptions, OutlierOptions, SparseOptions
from hesse.methods.solver_options import SolverOptions
from hesse.planning import Candidate, ChoiceGroup, Problem, cheapest_within

SOLVERS = {"low_rank": "two_sided_alternating", "outliers": "two_sided_outliers"}


def grid(bits: int, group_size: int) -> GridOptions:
    """The default rounding's grid."""
    return GridOptions(bits=bits, group_size=group_size, headroom=1.0, signed=True)


@dataclass(frozen=True)
class Scheme:
    """What may be done to a layer, under the Kronecker curvature."""

    label: str
    constraint: ConstraintOptions

    @property
    def rule(self) -> Rule:
        """For all layers."""
        beside = next((part for part in SOLVERS if getattr(self.constraint, part) is not None), None)
        alone = "admm" if self.constraint.grid is None else "two_sided_feedback"
        solver = SolverOptions(name=alone if beside is None else SOLVERS[beside])
        return Rule(curvature="kronecker", constraint=self.constraint, solver=solver)

    def bits(self, shape: torch.Size) -> float:
        """A weight's, of the joint set of zeros and codes with kept codes and a mask, whatever a file stores."""
        parts = self.constraint
        constraint = parts.build().stored_as(stored_dtype(DEFAULT_FOLDER))
        if parts.grid is None or parts.sparse is None:
            return constraint.bits_per_weight(shape)
        codes, mask = parts.grid.build(), parts.sparse.build()
        kept = mask.amount / mask.of if mask.of else 1 - mask.amount
        scales = codes.stored_as(constraint.dtype).bits_per_weight(shape) - codes.bits
        return kept * codes.bits + scales + 1


CODES = [
    Scheme(f"{b} bits, groups of {g}", ConstraintOptions(grid=grid(b, g))) for b in (2, 3, 4) for g in (32, 64, 128)
]
OUTLIERS = [
    Scheme(
        f"{b} bits, groups of 128, {share:.1%} as they are",
        ConstraintOptions(grid=grid(b, 128), outliers=OutlierOptions(share=share)),
    )
    for b in (2, 3)
    for share in (0.005, 0.01)
]
RANKS = [
    Scheme(
        f"{b} bits, groups of 128, and rank {rank}",
        ConstraintOptions(grid=grid(b, 128), low_rank=LowRankOptions(rank=rank)),
    )
    for b in (2, 3)
    for rank in (2, 4, 8)
]
ZEROS = [
    Scheme(f"2:4 and {b} bits, groups of 64", ConstraintOptions(grid=grid(b, 64), sparse=SparseOptions(amount="2:4")))
    for b in (3, 4)
]


# What is there without the end loss's curvature: the best of each kind.
JOINT = {"sparsity": "2:4", "group_size": 64, "act_order": False}
OTHERS = [
    ("gptq", {"bits": 3, **JOINT}),
    ("gptq", {"bits": 4, **JOINT}),
    ("admm", {"sparsity": "2:4"}),
    ("gptq", {"bits": 3, "group_size": 64}),
]


@cache
def statistics_folder() -> Path:
    """Statistics of the default model, estimated once."""
    folder = Path(tempfile.mkdtemp()) / "statistics"
    hesse.estimate("default", folder, curvatures=("gram", "kronecker"), samples=32, length=LENGTH)
    return folder


@cache
def shapes() -> dict[str, torch.Size]:
    """Of the layers' weights."""
    checkpoint = open_checkpoint(DEFAULT_FOLDER)
    names = Statistics(statistics_folder()).output_factors
    return {name: checkpoint.read([f"{name}.weight"])[f"{name}.weight"].shape for name in names}


@cache
def costs(scheme: Scheme) -> dict[str, tuple[int, float]]:
    """Of each layer: bits in all, and nats per token that the scheme costs there alone."""
    statistics, checkpoint, solver = Statistics(statistics_folder()), open_checkpoint(DEFAULT_FOLDER), LayerSolver()
    found, device = {}, torch.device("cpu")
    for name in statistics.output_factors:
        weight = checkpoint.read([f"{name}.weight"])[f"{name}.weight"].float()
        gram, kronecker = statistics.gram(name, device), statistics.kronecker(name, device)
        assert gram is not None
        assert kronecker is not None
        constraint = scheme.constraint.build().stored_as(checkpoint.dtype(f"{name}.weight"))
        statistics = {"inputs": gram, "output factor": kronecker.output_factor}
        problem = LayerProblem(name, weight, statistics, scheme.rule, constraint)
        change = solver.solve(problem).solution.weight - weight
        increase = effect(change, gram, kronecker.output_factor).loss_increase
        found[name] = round(scheme.bits(weight.shape) * weight.numel()), max(increase or 0.0, 0.0)
    return found


def planned(schemes: list[Scheme], bits: float) -> tuple[Recipe, float, dict[str, int]]:
    """The recipe of the least predicted loss at a mean of `bits`, the bits it comes to, how often each scheme is in."""
    tables = [costs(scheme) for scheme in schemes]
    total = sum(shape.numel() for shape in shapes().values())
    groups = tuple(
        ChoiceGroup(name, tuple(Candidate(s.label, *table[name]) for s, table in zip(schemes, tables, strict=True)))
        for name in tables[0]
    )
    problem = Problem(groups)
    choice = cheapest_within(problem, int(bits * total))
    rules = [
        schemes[place].rule.model_copy(update={"layers": (group.name,)})
        for group, place in zip(groups, choice, strict=True)
    ]
    labels = [schemes[place].label for place in choice]
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    return Recipe(rules=tuple(rules)), problem.size(choice) / total, counts


def measure(recipe: Recipe, samples: int) -> tuple[float, float]:
    """KL and predicted loss."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        report = hesse.compress("default", out, recipe=recipe, samples=samples, length=LENGTH).report
        found = hesse.evaluate(out, reference="default", samples=SAMPLES, length=LENGTH).report
    assert found.kl is not None
    return found.kl, report.loss.predicted


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--bits", default="2.5,3.2")
    arguments = parser.parse_args()
    total = sum(shape.numel() for shape in shapes().values())
    print("| one scheme for all layers | bits a weight | KL | predicted |\n|---|---|---|---|")
    sparse_alone = Scheme("2:4, values as they are", ConstraintOptions(sparse=SparseOptions(amount="2:4")))
    for scheme in (*CODES[2:6], *ZEROS, sparse_alone, *OUTLIERS[2:], *RANKS[3:]):
        kl, predicted = measure(Recipe(rules=(scheme.rule,)), arguments.samples)
        bits = sum(scheme.bits(shape) * shape.numel() for shape in shapes().values()) / total
        print(f"| {scheme.label} | {bits:.3f} | {kl:.5f} | {predicted:.5f} |", flush=True)
    print("\n| by other curvatures, the same set | KL | predicted |\n|---|---|---|")
    for method, options in OTHERS:
        recipe = hesse.methods.METHODS[method].recipe(hesse.Options(**options))
        kl, predicted = measure(recipe, arguments.samples)
        print(f"| `{method}`, {asked(options)} | {kl:.5f} | {predicted:.5f} |", flush=True)
    print("\n| one plan over | bits a weight | KL | predicted | what it took |\n|---|---|---|---|---|")
    menus = {
        "bits": CODES,
        "bits and outliers": [*CODES, *OUTLIERS],
        "bits and rank": [*CODES, *RANKS],
        "bits, zeros, outliers and rank": [*CODES, *ZEROS, *OUTLIERS, *RANKS],
    }
    for bits in map(float, arguments.bits.split(",")):
        for name, menu in menus.items():
            recipe, reached, counts = planned(menu, bits)
            kl, predicted = measure(recipe, arguments.samples)
            taken = "; ".join(f"{count} × {label}" for label, count in counts.items())
            print(f"| {name} | {reached:.3f} | {kl:.5f} | {predicted:.5f} | {taken} |", flush=True)
    print("\n", limits())


if __name__ == "__main__":
    main()
