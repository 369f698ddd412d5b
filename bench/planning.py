"""One budget shared out, beside one scheme for all layers: KL on held-out text at three sizes.

    python bench/planning.py [--method kronecker] [--model FOLDER]

For each budget of mean bits: the plan of `hesse compress --bits 3.2`; the largest uniform recipe of that size or less,
and the smallest of that size or more; and a plan that also knows how the layers' changes interact. For that each
group is changed alone (3 bits, groups of 64), and the correlations of what that does to the logits, in the metric of
the model's own probabilities, say how the square roots of the costs add up. Results go to `bench/planning.json`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import limits
from torch import Tensor

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.data.selection import Calibration, factor_tokens, select_samples
from hesse.estimation import GramAccumulator
from hesse.formats import open_networks
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method
from hesse.planning import Candidate, Choice, ChoiceGroup, Problem, cheapest_within
from hesse.planning.costs import CostMeter
from hesse.planning.menu import LayerGroup, make_menu
from hesse.planning.priced_menu import PricedMenu
from hesse.progress import Silence

HERE = Path(__file__).resolve().parent
BUDGETS = (2.5, 3.2, 4.2)
SAMPLES, LENGTH = 128, 256
REFERENCE = "3 bits, groups of 64"
CHANGED_SAMPLES = 4  # that each group's change is looked at on
ROWS = 128  # tokens whose logits of all changes are held at once
UNIFORM = tuple((bits, group) for bits in (2, 3, 4, 5) for group in (128, 64, 32))  # by rising size


def measure(model: Path, recipe: Recipe) -> dict[str, Any]:
    """Compress with a recipe, and compare with the dense model on held-out text."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        report = hesse.compress(model, out, recipe=recipe, samples=SAMPLES, length=LENGTH).report
        found = hesse.evaluate(out, reference=model, samples=SAMPLES, length=LENGTH).report
    return {
        "bits": report.bits_per_weight,
        "bytes": report.bytes_after,
        "predicted": report.loss.predicted,
        "kl": found.kl,
        "kl_standard_error": found.kl_standard_error,
    }


def neighbours(bits: float) -> list[tuple[int, int]]:
    """The uniform schemes next to a mean of bits: at most it, and at least it."""
    sizes = {(b, group): b + 16 / group for b, group in UNIFORM}
    below = [scheme for scheme in UNIFORM if sizes[scheme] <= bits]
    above = [scheme for scheme in UNIFORM if sizes[scheme] >= bits]
    return list(dict.fromkeys([max(below, key=sizes.__getitem__), min(above, key=sizes.__getitem__)]))


class Study:
    """The default menu of a model, its costs, and how its groups interact."""

    def __init__(self, model: Path, method: str) -> None:
        self.method = find_method(method)
        self.calibration = Calibration(None, SAMPLES, LENGTH, 0, None)
        self.checkpoint, self.dense, self.network = open_networks(model, torch.device("cpu"))
        self.menu = make_menu(self.network, self.method, Options(), (), "transformers", "auto")
        outputs = [layer.weight.shape[0] for layer in self.network.layers]
        self.selected = select_samples(model, self.calibration, self.network, factor_tokens(outputs))
        meter = CostMeter(self.menu)
        meter.measure(self.network, self.selected, self.calibration, Silence())
        self.priced = PricedMenu(self.checkpoint, self.menu, meter.costs)
        self.correlations = self._correlations()

    def recipe(self, choice: Choice) -> Recipe:
        """A choice as a recipe."""
        return self.priced.recipe(choice, self.method, ())

    def with_interactions(self, bits: float) -> Choice:
        """The best choice found for sᵀRs, s the square roots of the costs, by linearising around the last one."""
        problem, room = self.priced.problem, int(bits * self.priced.weights / 8)

        def joint(choice: Choice) -> float:
            roots = np.sqrt([candidate.loss for candidate in problem.chosen(choice)])
            return float(roots @ self.correlations @ roots)

        choice = cheapest_within(problem, room)
        best, seen = choice, set[Choice]()
        while choice not in seen:
            seen.add(choice)
            best = min(best, choice, key=joint)
            roots = np.sqrt([candidate.loss for candidate in problem.chosen(choice)])
            slopes = 2 * (self.correlations - np.eye(len(roots))) @ roots
            groups = []
            for group, slope in zip(problem.groups, slopes, strict=True):
                costs = [c.loss + slope * c.loss**0.5 for c in group.candidates]
                shifted = zip(group.candidates, costs, strict=True)
                members = tuple(Candidate(c.label, c.size, cost - min(costs)) for c, cost in shifted)
                groups.append(ChoiceGroup(group.name, members))
            choice = cheapest_within(Problem(tuple(groups)), room)
        return best

    def _correlations(self) -> np.ndarray:
        """Of what the groups' changes do to the logits (groups, groups)."""
        ids = torch.stack(self.selected.samples.ids[:CHANGED_SAMPLES])
        with self.dense.whole() as whole, torch.no_grad():
            grams = self._grams(whole, ids)

            def logits() -> Tensor:
                return whole(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)

            before, effects = logits(), []
            for group in self.menu:
                kept = [layer.parameter for layer in group.layers]
                self._change(group, grams)
                effects.append((logits() - before).half())
                for layer, parameter in zip(group.layers, kept, strict=True):
                    layer.module.weight = parameter
        total = torch.zeros(len(effects), len(effects), dtype=torch.float64)
        for start in range(0, len(before), ROWS):
            probabilities = before[start : start + ROWS].softmax(-1)
            rows = torch.stack([effect[start : start + ROWS].float() for effect in effects])
            rows -= (rows * probabilities).sum(-1, keepdim=True)
            flat = (rows * probabilities.sqrt()).flatten(1)
            total += (flat @ flat.T).double()
        sizes = total.diagonal().sqrt()
        return (total / sizes / sizes[:, None]).numpy()

    def _grams(self, whole: torch.nn.Module, ids: Tensor) -> dict[str, GramAccumulator]:
        sums, hooks = {}, []
        for layer in self.dense.layers:
            sums[layer.name] = GramAccumulator(layer.name, layer.weight.shape[1], layer.weight.device)
            add = sums[layer.name].add
            hooks.append(layer.module.register_forward_pre_hook(lambda _, inputs, add=add: add(inputs[0])))
        whole(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return sums

    def _change(self, group: LayerGroup, grams: dict[str, GramAccumulator]) -> None:
        """Solve a group's layers at the reference."""
        (offer,) = [offer for offer in group.offers if offer.label == REFERENCE]
        assert offer.rule is not None
        for layer in group.layers:
            constraint = offer.constraints[layer.name]
            assert constraint is not None
            gram, weight = grams[layer.name].gram(), layer.weight.float()
            solved = LayerSolver().solve(LayerProblem(layer.name, weight, {"inputs": gram}, offer.rule, constraint))
            layer.replace(solved.solution.weight)


def main() -> None:
    """Measure everything, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default=DEFAULT_METHOD)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    arguments = parser.parse_args()
    model, method = arguments.model.resolve(), find_method(arguments.method)
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[int, int], dict[str, Any]] = {}

    def row(budget: float, kind: str, recipe: Recipe, **more: Any) -> dict[str, Any]:
        found = {"budget": budget, "kind": kind, **measure(model, recipe), **more}
        rows.append(found)
        print(json.dumps(found), flush=True)
        return found

    for budget in BUDGETS:
        wall, processor = time.perf_counter(), time.process_time()
        plan = hesse.plan(model, mean_bits=budget, method=arguments.method, samples=SAMPLES, length=LENGTH).report
        seconds = {"plan_seconds": time.perf_counter() - wall, "plan_cpu_seconds": time.process_time() - processor}
        row(budget, "planned", plan.recipe, plan_predicted=plan.loss.predicted, **seconds)
        for bits, group in neighbours(budget):
            if (bits, group) not in measured:
                recipe = method.recipe(Options(bits=bits, group_size=group))
                measured[bits, group] = row(budget, f"uniform, {bits} bits, groups of {group}", recipe)
    study = Study(model, arguments.method)
    off = study.correlations[~np.eye(len(study.menu), dtype=bool)]
    for budget in BUDGETS:
        row(budget, "planned, with interactions", study.recipe(study.with_interactions(budget)))
    results = {
        "machine": limits(),
        "method": arguments.method,
        "samples": SAMPLES,
        "length": LENGTH,
        "correlations": {"mean": float(off.mean()), "least": float(off.min()), "most": float(off.max())},
        "rows": rows,
    }
    (HERE / "planning.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
