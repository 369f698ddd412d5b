"""Methods that train, at equal training: what each leaves of a network at several sparsities, and the papers' claims.

    python bench/gradual.py [--only digits,transfer,language,onebit] [--seeds 3] [--sparsities 0.7,0.9]

Every row takes the same number of gradients from the same dense network, with the same optimiser and, but for plain
GMP, the same teacher; CrAM, which takes two a step, half as many steps. Prints Markdown: test loss and accuracy, as
means over seeds. `tests/digits.py` has the network for two of the tasks, the default model is the third.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.curvature import CrossEntropy
from hesse.curvature.losses import next_tokens
from hesse.training import CompressionAware, Held, HeldSigns, Movement, OneBit, Training, linear_decay, prunable_weights

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

LOSS = CrossEntropy()
Forward = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Task:
    """A trained network, what it is trained on, and what it is judged by."""

    dense: nn.Module
    teacher: nn.Module
    train: Iterable[Any]
    test: list[Any]
    training: Training
    layers: tuple[str, ...] = ("*",)
    forward: Forward | None = None
    cuts: int = 10

    def loss(self, model: nn.Module) -> float:
        """The loss on the test data."""
        return hesse.Objective.of(model, LOSS, self.test, forward=self.forward).value()

    def accuracy(self, model: nn.Module) -> float:
        """The share of the test data's targets that come first."""
        call = self.forward or (lambda network, inputs: network(inputs))
        with torch.no_grad():
            hits = [(call(model, inputs).argmax(-1) == targets)[targets >= 0] for inputs, targets in self.test]
        return float(torch.cat(hits).double().mean())


def one_shot(task: Task, training: Training | None, sparsity: float, method: str = "magnitude") -> nn.Module:
    """Pruned at once, then trained with its zeros held; not trained for None."""
    options = hesse.Options(sparsity=sparsity, scope="layer")
    how = {"loss_function": LOSS, "forward": task.forward, "layers": task.layers}
    few = [batch for batch, _ in zip(task.train, range(8), strict=False)]
    model = hesse.compress(task.dense, data=few, method=method, options=options, **how).model
    if training is None:
        return model
    hesse.finetune(model, task.train, training, loss_function=LOSS, forward=task.forward)
    return model


def gradual(task: Task, training: Training, sparsity: float, method: str = "magnitude", **options: Any) -> nn.Module:
    """Pruned cut by cut."""
    model = copy.deepcopy(task.dense)
    chosen = {"cuts": task.cuts, "calibration": 8, "layers": task.layers, **options}
    how = {"loss_function": LOSS, "forward": task.forward, "options": hesse.Options(scope="layer"), "method": method}
    hesse.prune_gradually(model, task.train, training, sparsity, **how, **chosen)  # type: ignore[arg-type]
    return model


def plain_gmp(task: Task, training: Training, sparsity: float) -> nn.Module:
    """Gradual magnitude pruning as it was before it was tuned: from nothing, one falling rate, no teacher."""
    return gradual(task, replace(training, teacher=None, rate=linear_decay), sparsity, first=0.0)


def movement(task: Task, training: Training, sparsity: float) -> nn.Module:
    """Scores that training finds."""
    model = copy.deepcopy(task.dense)
    schedule = hesse.training.GradualSchedule(sparsity, training.steps, cuts=training.steps // 4, first=0.0)
    held = {name: Movement(hesse.Sparse(sparsity), schedule) for name in prunable_weights(model, layers=task.layers)}
    hesse.finetune(model, task.train, training, loss_function=LOSS, forward=task.forward, held=held)
    return model


def dense_then(task: Task, training: Training, sparsity: float, rule: bool) -> nn.Module:
    """Trained dense, by CrAM with `rule`, then pruned at once and left so."""
    model = copy.deepcopy(task.dense)
    patterns = tuple(hesse.Sparse(amount) for amount in (0.5, 0.7, 0.9))
    chosen = CompressionAware(prunable_weights(model, layers=task.layers), patterns) if rule else None
    halved = replace(training, steps=training.steps // 2) if rule else training
    hesse.finetune(model, task.train, halved, loss_function=LOSS, forward=task.forward, held={}, rule=chosen)
    return one_shot(replace(task, dense=model), None, sparsity)


ROWS: dict[str, Callable[[Task, Training, float], nn.Module]] = {
    "magnitude in one shot, then trained": one_shot,
    "`obert` in one shot, then trained": partial(one_shot, method="obert"),
    "plain GMP: no teacher, no rewinds, from 0": plain_gmp,
    "`gmp`": gradual,
    "gradual `wanda`": partial(gradual, method="wanda"),
    "`gradual-obert`": partial(gradual, method="obert"),
    "`movement`": movement,
    "trained dense, then magnitude in one shot": partial(dense_then, rule=False),
    "`cram`, then magnitude in one shot": partial(dense_then, rule=True),
}
# What is claimed: the first has the lower test loss.
CLAIMS = (
    ("a tuned GMP is far better than plain GMP", "`gmp`", "plain GMP: no teacher, no rewinds, from 0"),
    ("gradual is better than one shot with the same training", "`gmp`", "magnitude in one shot, then trained"),
    ("GMP* matches gradual oBERT", "`gmp`", "`gradual-obert`"),
    ("movement wins at high sparsity", "`movement`", "`gmp`"),
    (
        "CrAM survives one-shot pruning",
        "`cram`, then magnitude in one shot",
        "trained dense, then magnitude in one shot",
    ),
)


def adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Adam at a rate."""
    return lambda named: torch.optim.Adam(named, lr=rate)


def digits(transfer: bool) -> Task:
    """A network that reads digits; with `transfer`, one that learned them upside down and is to read them upright."""
    import digits as data

    torch.manual_seed(0)
    (images, labels), _ = data.digits()
    train = DataLoader(TensorDataset(images, labels), 64, shuffle=True)
    teacher = data.trained("mlp")
    dense = teacher
    if transfer:
        upside_down = DataLoader(TensorDataset(images.flip(2), labels), 64, shuffle=True)
        dense = data.mlp()
        hesse.finetune(dense, upside_down, Training(steps=336, optimizer=adam(4e-3)), loss_function=LOSS, held={})
    distillation = hesse.training.Distillation(0.9, 2.0)
    training = Training(steps=420, optimizer=adam(4e-3), teacher=teacher, distillation=distillation)
    return Task(dense, teacher, train, data.batches("test"), training)


def language() -> Task:
    """The default model, on windows of its own kind of text."""
    from transformers import AutoModelForCausalLM

    from hesse.data import read_samples

    def windows(purpose: str, count: int) -> list[Any]:
        options: dict[str, Any] = {"seed": 0, "purpose": purpose, "limit": None}
        some = read_samples(None, DEFAULT_FOLDER, count=count, length=64, **options)[0].batches(4)
        return [(ids, next_tokens(ids)) for ids in some]

    dense = AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32, trust_remote_code=False)
    how = hesse.training.Distillation(1.0, 1.0)
    training = Training(steps=32, optimizer=adam(1e-3), teacher=dense, distillation=how)
    train, test = windows("calibration", 128), windows("evaluation", 48)
    layers = ("*.self_attn.*", "*.mlp.*")
    return Task(dense, dense, train, test, training, layers, lambda network, ids: network(input_ids=ids).logits, cuts=4)


TASKS: dict[str, Callable[[], Task]] = {
    "digits": partial(digits, False),
    "transfer": partial(digits, True),
    "language": language,
}


def one_bit(task: Task, seeds: int) -> None:
    """Print what one bit a weight leaves: as it is fitted, with the vectors trained, and with the signs trained too."""
    names = prunable_weights(task.dense, layers=task.layers)
    matrices = {name: weight.detach().flatten(1) for name, weight in task.dense.named_parameters() if name in names}
    ways: dict[str, Callable[[Tensor], Held]] = {
        "`HeldSigns`": lambda weight: HeldSigns(weight >= 0),
        "`OneBit`": lambda weight: OneBit(),
    }
    fitted = hesse.compress(task.dense, data=task.test, method="onebit", loss_function=LOSS, layers=task.layers).model
    print(f"\n| one bit a weight | test loss |\n|---|---|\n| dense | {task.loss(task.dense):.3f} |")
    print(f"| `onebit`, not trained | {task.loss(fitted):.3f} ({task.accuracy(fitted):.1%}) |")
    for way, make in ways.items():
        results = []
        for seed in range(seeds):
            model = copy.deepcopy(task.dense)
            held = {name: make(weight) for name, weight in matrices.items()}
            hesse.finetune(model, task.train, replace(task.training, seed=seed), loss_function=LOSS, held=held)
            results.append((task.loss(model), task.accuracy(model)))
        loss, accuracy = (sum(part) / seeds for part in zip(*results, strict=True))
        print(f"| {way}, trained | {loss:.3f} ({accuracy:.1%}) |", flush=True)


def main() -> None:
    """Train what was asked for, and print the tables and the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join((*TASKS, "onebit")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", default="0.7,0.8,0.9,0.95")
    parser.add_argument("--rows", default=",".join(ROWS), help="substrings of the rows to run, with commas between")
    arguments = parser.parse_args()
    sparsities = [float(amount) for amount in arguments.sparsities.split(",")]
    rows = [row for row in ROWS if any(part in row for part in arguments.rows.split(","))]
    for name in arguments.only.split(","):
        if name == "onebit":
            one_bit(digits(transfer=False), arguments.seeds)
            continue
        task = TASKS[name]()
        found = {row: {amount: mean(task, row, amount, arguments.seeds) for amount in sparsities} for row in rows}
        print(f"\n{name}: {task.training.steps} gradients; dense {task.loss(task.teacher):.4f}", end="")
        print(
            f" ({task.accuracy(task.teacher):.1%})\n\n| method | " + " | ".join(f"{a:.0%}" for a in sparsities) + " |"
        )
        print("|---|" + "---|" * len(sparsities))
        for row, cells in found.items():
            shown = [f"{loss:.3f} ({accuracy:.1%})" for loss, accuracy in cells.values()]
            print(f"| {row} | " + " | ".join(shown) + " |")
        print("\n| claim | outcome |\n|---|---|")
        for claim, ours, theirs in CLAIMS:
            if ours in found and theirs in found:
                both = [(amount, found[ours][amount][0], found[theirs][amount][0]) for amount in sparsities]
                outcomes = [f"{a:.0%}: {x:.3f} against {y:.3f}" for a, x, y in both]
                print(f"| {claim} | " + ", ".join(outcomes) + " |", flush=True)


def mean(task: Task, row: str, sparsity: float, seeds: int) -> tuple[float, float]:
    """Test loss and accuracy, over seeds."""
    results = []
    begun = time.perf_counter()
    for seed in range(seeds):
        model = ROWS[row](task, replace(task.training, seed=seed), sparsity)
        weights = dict(model.named_parameters())
        pruned = [weights[name] for name in prunable_weights(model, layers=task.layers)]
        zeros = sum(int((weight == 0).sum()) for weight in pruned) / sum(weight.numel() for weight in pruned)
        assert abs(zeros - sparsity) < 0.01, f"{row} left {zeros:.3f} zeros, and {sparsity} were asked"
        results.append((task.loss(model), task.accuracy(model)))
    print(f"{row}, {sparsity}: {results} in {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    losses, accuracies = zip(*results, strict=True)
    return sum(losses) / seeds, sum(accuracies) / seeds


if __name__ == "__main__":
    main()
