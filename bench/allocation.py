"""Whether the literature's ways to share out bits and zeros hold what they claim, in small.

    python bench/allocation.py [--only bits,bisect,tiles,checkpoint] [--seeds 5]

"bits", "bisect" and "tiles" train vision transformers on scikit-learn's digits, one a seed, and measure
on images that neither training nor planning saw: KL(dense || changed) of equally large plans, the size at an equal
floor, and the loss of equally sparse ones before and after the same training. "checkpoint" plans the default model by
`hesse compress --bits 3.2 --allocation ...`. Prints Markdown.
"""

import argparse
import math
import random
import statistics
import sys
from copy import deepcopy
from pathlib import Path

import torch
from machine import limits
from planning import measure
from torch import Tensor, nn

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.constraints import Sparse
from hesse.curvature import CrossEntropy, Objective
from hesse.methods import Options, find_method
from hesse.planning import Choice, Problem
from hesse.planning.bisection import smallest_accepted
from hesse.planning.block_sparsity import plan_tiles
from hesse.planning.pricing import Menu, changes_of, grid_menu, menu_problem, price, use
from hesse.scores.sensitivities import predicted_costs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import digits

BITS = (8, 6, 4, 3, 2)
PREDICTORS = ("hawq", "hawq-v2", "q-bert", "second-order", "inter-layer", "q-vlm")
ORDERS = ("hawq", "hawq-v2", "q-bert", "second-order", "inter-layer")  # of bisections
FLOOR = 0.01  # KL that a bisection accepts
RANDOM_PLANS = 10
SAMPLES = 128  # that plans look at
BATCH = 32
TILE = (4, 4)
FINE_TUNING = 4  # epochs


def network(seed: int) -> nn.Module:
    """A vision transformer that knows the digits."""
    torch.manual_seed(seed)
    return digits.train(digits.VisionTransformer(), digits.EPOCHS["vit"], seed=seed)


def objective_of(model: nn.Module) -> Objective:
    """The loss on images that it was trained on, of the matrices inside the blocks."""
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks")]
    images, labels = (part[:SAMPLES].split(BATCH) for part in digits.digits()[0])
    return Objective.of(model, CrossEntropy(), list(zip(images, labels, strict=True)), names)


def logits(model: nn.Module) -> Tensor:
    """On the test images."""
    with torch.no_grad():
        found: Tensor = model(digits.digits()[1][0])
    return found


def divergence(dense: Tensor, changed: Tensor) -> float:
    """KL(dense || changed) in nats an image."""
    logarithms = (changed.log_softmax(-1), dense.log_softmax(-1))
    return float(nn.functional.kl_div(*logarithms, log_target=True, reduction="batchmean"))


def with_choice(model: nn.Module, menu: Menu, choice: Choice) -> nn.Module:
    """A copy with the chosen members."""
    copied = deepcopy(model)
    use(objective_of(copied), menu, choice)
    return copied


def summary(values: list[float]) -> str:
    """Geometric mean, least and largest."""
    mean = math.exp(statistics.fmean(math.log(max(value, 1e-9)) for value in values))
    return f"{mean:.5f} ({min(values):.5f} to {max(values):.5f})"


def random_choice(problem: Problem, room: int, generator: random.Random) -> Choice:
    """A plan without thought: groups in random order take a larger member as long as it fits."""
    places = [len(group.candidates) - 1 for group in problem.groups]  # the smallest
    left = room - problem.smallest
    for place in generator.sample(range(len(places)), len(places)) * len(BITS):
        members = problem.groups[place].candidates
        step = places[place] - 1
        if step >= 0 and members[step].size - members[places[place]].size <= left and generator.random() < 0.5:
            left -= members[step].size - members[places[place]].size
            places[place] = step
    return tuple(places)


def bits(seeds: int) -> None:
    """Plans of the size of uniform bits."""
    found: dict[int, dict[str, list[float]]] = {uniform: {} for uniform in (2, 3, 4)}
    for seed in range(seeds):
        model = network(seed)
        dense, objective = logits(model), objective_of(model)
        menu = grid_menu(objective, BITS)
        prices = {name: price(objective, menu, name) for name in PREDICTORS}
        problem = prices["q-vlm"].problem
        print(f"seed {seed}: blocks of q-vlm {prices['q-vlm'].blocks}", file=sys.stderr, flush=True)
        for uniform, rows in found.items():
            same = (BITS.index(uniform),) * len(menu)
            # A quarter of a bit above two, since nothing lies below.
            room = problem.size(same) if uniform > 2 else int(1.125 * problem.size(same))
            plans = {"uniform": same, **{name: own.cheapest(room) for name, own in prices.items()}}
            for name, choice in plans.items():
                assert problem.size(choice) <= room
                rows.setdefault(name, []).append(divergence(dense, logits(with_choice(model, menu, choice))))
            generator = random.Random(seed)
            drawn = [random_choice(problem, room, generator) for _ in range(RANDOM_PLANS)]
            measured = [divergence(dense, logits(with_choice(model, menu, choice))) for choice in drawn]
            rows.setdefault("random", []).append(statistics.median(measured))
    for uniform, rows in found.items():
        more = " and an eighth more bytes" if uniform == 2 else ""
        print(f"\n| plan at {uniform} bits{more} | KL | of uniform |\n|---|---|---|")
        for name, values in rows.items():
            ratio = statistics.fmean(math.log(a / b) for a, b in zip(values, rows["uniform"], strict=True))
            print(f"| {name} | {summary(values)} | {math.exp(ratio):.2f} |", flush=True)


def sizes_at_floor(seed: int) -> tuple[dict[str, float], int]:
    """Bits a weight at which one network still holds `FLOOR`, by order of the bisection; how often it was measured."""
    model = network(seed)
    objective = objective_of(model)
    menu = grid_menu(objective, BITS)
    images = digits.digits()[0][0][:SAMPLES]
    with torch.no_grad():
        dense = model(images)
    measured: list[float] = []

    def accepts(choice: Choice) -> bool:
        with torch.no_grad():
            measured.append(divergence(dense, with_choice(model, menu, choice)(images)))
        return measured[-1] <= FLOOR

    generator = random.Random(seed)
    costs = {name: predicted_costs(objective, changes_of(objective, menu), name) for name in ORDERS}
    costs["random"] = {name: [generator.random() for _ in BITS] for name in menu}
    weights = sum(parameter.numel() for parameter in objective.parameters)
    found = {}
    for name, own in costs.items():
        problem = menu_problem(menu, own)
        found[name] = 8 * problem.size(smallest_accepted(problem, accepts)) / weights
    return found, len(measured)


def bisect(seeds: int) -> None:
    """The size at which a floor of KL on the training images still holds."""
    found: dict[str, list[float]] = {}
    measurements = 0
    for seed in range(seeds):
        sizes, measured = sizes_at_floor(seed)
        measurements += measured
        for name, size in sizes.items():
            found.setdefault(name, []).append(size)
    print(f"\n| order of the bisection | bits a weight at KL {FLOOR} |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {summary(values)} |", flush=True)
    print(f"\n{measurements / (seeds * len(found)):.0f} measurements a search")


def tuned(model: nn.Module, masks: dict[str, Tensor]) -> float:
    """The test loss after training with the zeros held."""
    copied = deepcopy(model).train()
    named = dict(copied.named_parameters())
    (images, labels), _ = digits.digits()
    optimiser = torch.optim.Adam(copied.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(FINE_TUNING):
        for chosen in torch.randperm(len(labels), generator=generator).split(digits.BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(copied(images[chosen]), labels[chosen]).backward()
            optimiser.step()
            for name, mask in masks.items():
                named[name].data.mul_(mask)
    return test_loss(copied.eval())


def test_loss(model: nn.Module) -> float:
    """Cross-entropy on the test images."""
    return float(nn.functional.cross_entropy(logits(model), digits.digits()[1][1]))


def magnitude_tiles(objective: Objective, kept: float, everywhere: bool) -> dict[str, Tensor]:
    """The tiles of the largest norms, of each matrix or of all together."""
    norms = {}
    for name, parameter in objective.named.items():
        rows, columns = parameter.shape
        tiles = parameter.detach().square().reshape(rows // TILE[0], TILE[0], columns // TILE[1], TILE[1]).sum((1, 3))
        norms[name] = tiles
    every = torch.cat([tiles.flatten() for tiles in norms.values()]).sort().values
    masks = {}
    for name, tiles in norms.items():
        mask = tiles >= every[round((1 - kept) * len(every))] if everywhere else Sparse(1 - kept).mask(tiles)
        masks[name] = mask.repeat_interleave(TILE[0], 0).repeat_interleave(TILE[1], 1)
    return masks


def tiles(seeds: int) -> None:
    """Tiles of 4 × 4 by several scores, before and after the same training."""
    print(f"\n| zeros in tiles of 4 × 4 | plan | test loss | after {FINE_TUNING} epochs |\n|---|---|---|---|")
    models = [network(seed) for seed in range(seeds)]
    print(f"| none | | {summary([test_loss(model) for model in models])} | {summary([tuned(m, {}) for m in models])} |")
    for kept in (0.7, 0.5, 0.3):
        found: dict[str, list[tuple[float, float]]] = {}
        for model in models:
            objective = objective_of(model)
            masks = {
                "norm, each matrix": magnitude_tiles(objective, kept, everywhere=False),
                "norm, all matrices": magnitude_tiles(objective, kept, everywhere=True),
                "curves: mean gradient, λ 1 (LPViT)": plan_tiles(objective, kept, gradients="mean").masks,
                "curves: mean gradient, λ 10⁶": plan_tiles(objective, kept, gradients="mean", damping=1e6).masks,
                "curves: empirical Fisher": plan_tiles(objective, kept, gradients="empirical").masks,
                "curves: true Fisher": plan_tiles(objective, kept).masks,
            }
            for name, own in masks.items():
                copied = deepcopy(model)
                for key, mask in own.items():
                    dict(copied.named_parameters())[key].data.mul_(mask)
                found.setdefault(name, []).append((test_loss(copied), tuned(copied, own)))
        for name, values in found.items():
            before, after = ([value[place] for value in values] for place in (0, 1))
            print(f"| {1 - kept:.0%} | {name} | {summary(before)} | {summary(after)} |", flush=True)


def checkpoint() -> None:
    """Plans of the default model."""
    print("\n| mean bits | method | allocation | its bits | KL | seconds to plan |\n|---|---|---|---|---|---|")
    for budget, uniform in ((2.5, (2, 32)), (3.25, (3, 64))):
        for method in ("rtn", "gptq"):
            for allocation in (None, "hawq", "hawq-v2"):
                plan = hesse.plan(
                    DEFAULT_FOLDER, mean_bits=budget, method=method, allocation=allocation, samples=64, length=256
                ).report
                found = measure(DEFAULT_FOLDER, plan.recipe)
                row = f"| {budget} | `{method}` | {allocation or 'each choice solved'} | {found['bits']:.3f} "
                print(f"{row}| {found['kl']:.5f} | {plan.seconds['total']:.1f} |", flush=True)
            found = measure(DEFAULT_FOLDER, find_method(method).recipe(Options(bits=uniform[0], group_size=uniform[1])))
            print(f"| {budget} | `{method}` | uniform | {found['bits']:.3f} | {found['kl']:.5f} | |", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="bits,bisect,tiles,checkpoint")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        if name == "checkpoint":
            checkpoint()
        else:
            {"bits": bits, "bisect": bisect, "tiles": tiles}[name](arguments.seeds)
    print("\n", limits())


if __name__ == "__main__":
    main()
