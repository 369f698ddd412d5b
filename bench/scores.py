"""A score is not an effect: what removing the weights that each score ranks lowest does to the loss.

    python bench/scores.py --only digits

For every importance score and method of pruning, at three shares: the increase of the loss on data that nothing was
estimated from, with the mask alone, and with the method's new values where it has some. Random and magnitude are the
floors. `robust` compares masks on digits trained against attacks, `language` takes the default model: an hour on one
thread, or `--scores "Wanda;SparseGPT"`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import limits
from torch import Tensor, nn

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.curvature import CrossEntropy, Objective
from hesse.curvature.losses import next_tokens
from hesse.data import read_samples
from hesse.errors import HesseError
from hesse.scores import Attack

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import digits

SHARES = (0.5, 0.7, 0.9)
ATTACK = Attack(0.2, 7, lowest=-1, highest=1)
LENGTH = 128
Batches = list[tuple[Any, Tensor]]


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network, data to calibrate on, other data to measure with, and which of its layers are pruned."""

    model: nn.Module
    calibration: Batches
    held_out: Batches
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    layers: tuple[str, ...] = ("*",)
    few: int | None = None  # batches for what keeps the gradients of the whole network

    def loss(self, model: nn.Module) -> float:
        """On the held-out data."""
        names = [next(name for name, _ in model.named_parameters())]
        return Objective.of(model.requires_grad_(), CrossEntropy(), self.held_out, names, self.forward).value()

    @cached_property
    def dense(self) -> float:
        """The unchanged network's."""
        return self.loss(deepcopy(self.model))

    def masked(self, pruned: nn.Module, layers: list[str]) -> nn.Module:
        """The unchanged network without the weights that a report's result is without."""
        model = deepcopy(self.model)
        with torch.no_grad():
            for name in layers:
                module, other = model.get_submodule(name), pruned.get_submodule(name)
                module.weight.mul_(other.weight != 0)  # type: ignore[operator, union-attr]
        return model


Run = Callable[[Subject, float], tuple[nn.Module, list[str]]]  # the pruned network, and its pruned layers


def by_score(score: str, **options: Any) -> Run:
    """A score over the network."""

    def run(subject: Subject, share: float) -> tuple[nn.Module, list[str]]:
        data = subject.calibration[: subject.few] if score == "m-fac-network" else subject.calibration
        result = hesse.prune(
            subject.model,
            data=data,
            what="weights",
            method=score,
            sparsity=share,
            layers=subject.layers,
            forward=subject.forward,
            attack=ATTACK,
            **options,
        )
        return result.model, [layer.name for layer in result.report.layers]

    return run


def by_method(method: str, scope: str | None = None) -> Run:
    """A row of the table of methods, layer by layer."""

    def run(subject: Subject, share: float) -> tuple[nn.Module, list[str]]:
        options = hesse.Options(sparsity=share, scope=scope)
        result = hesse.compress(
            subject.model,
            data=subject.calibration,
            method=method,
            options=options,
            layers=subject.layers,
            forward=subject.forward,
        )
        assert result.model is not None
        return result.model, [layer.name for layer in result.report.layers]

    return run


# What is shown: a name, how, and where the share is counted.
ROWS: dict[str, tuple[Run, str]] = {
    "random": (by_score("random", scope="site"), "layer"),
    "random, global": (by_score("random"), "network"),
    "magnitude": (by_method("magnitude"), "layer"),
    "magnitude, global": (by_method("magnitude", "global"), "network"),
    "magnitude, LAMP": (by_method("magnitude", "lamp"), "network"),
    "w ⊙ g": (by_score("gradient"), "network"),
    "OBA over the network": (by_score("oba"), "network"),
    "OBA in 4 steps": (by_score("oba", steps=4), "network"),
    "OBA": (by_score("oba", scope="site"), "layer"),
    "OBD over the network": (by_score("obd"), "network"),
    "OBD in 4 steps": (by_score("obd", steps=4), "network"),
    "OBD": (by_method("obd"), "row"),
    "MAD": (by_score("mad"), "network"),
    "Wanda": (by_method("wanda"), "row"),
    "SparseGPT": (by_method("sparsegpt"), "layer"),
    "ADMM": (by_method("admm"), "layer"),
    "ADMM in the loss's curvature": (by_method("kronecker-admm"), "layer"),
    "OBC": (by_method("obc"), "layer"),
    "WoodFisher": (by_method("woodfisher"), "layer"),
    "oBERT": (by_method("obert"), "layer"),
    "M-FAC": (by_method("m-fac"), "layer"),
    "M-FAC over the network": (by_score("m-fac-network"), "network"),
    "M-FAC over the network in 4 steps": (by_score("m-fac-network", steps=4), "network"),
}


def on_digits() -> Subject:
    """The residual network, in training data and test data."""
    return Subject(digits.trained("conv"), digits.batches(samples=512), digits.batches("test"))


def on_language(samples: int = 16) -> Subject:
    """The default model as a plain module; the layers of its blocks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32).eval()

    def batches(purpose: Any, count: int) -> Batches:
        found, _ = read_samples(None, DEFAULT_FOLDER, count=count, length=LENGTH, seed=0, purpose=purpose, limit=None)
        return [(ids, next_tokens(ids)) for ids in found.batches(4)]

    return Subject(
        model,
        batches("calibration", samples),
        batches("evaluation", samples),
        lambda module, ids: module(input_ids=ids).logits,
        ("*.self_attn.*", "*.mlp.*"),
        few=3,
    )


def table(subject: Subject, only: list[str]) -> Iterator[str]:
    """The lines of a table."""
    yield f"\nLoss before: {subject.dense:.4f} nats on held-out data\n"
    yield (
        "| score | share of | " + " | ".join(f"{share:.0%}, mask | {share:.0%}, new values" for share in SHARES) + " |"
    )
    yield "|---|---|" + "---|" * (2 * len(SHARES))
    for name, (run, scope) in ROWS.items():
        if only and name not in only:
            continue
        cells = []
        for share in SHARES:
            try:
                pruned, layers = run(subject, share)
            except HesseError as error:
                cells += [str(error).split(":")[0], ""]
                continue
            mask = subject.loss(subject.masked(pruned, layers)) - subject.dense
            values = subject.loss(pruned) - subject.dense
            cells += [f"{mask:.3f}", "" if abs(values - mask) < 1e-6 else f"{values:.3f}"]
        yield f"| {name} | {scope} | {' | '.join(cells)} |"


def trained_against_attacks(epochs: int = 12) -> nn.Module:
    """The residual network, trained on attacked images only (Madry et al., 2018)."""
    torch.manual_seed(0)
    model, (images, labels) = digits.ConvNet(), digits.digits()[0]
    optimiser = torch.optim.Adam(model.parameters(), 4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(digits.BATCH):
            batch = [(images[chosen], labels[chosen])]
            ((moved, targets),) = ATTACK.on(Objective.of(model.eval(), CrossEntropy(), batch))
            optimiser.zero_grad()
            nn.functional.cross_entropy(model.train()(moved), targets).backward()
            optimiser.step()
    return model.eval()


def robust() -> Iterator[str]:
    """Accuracy under attack after pruning a network that was trained to withstand it."""
    model = trained_against_attacks()
    data, (images, labels) = digits.batches(samples=512), digits.digits()[1]

    def found(pruned: nn.Module) -> tuple[float, float]:
        objective = Objective.of(deepcopy(pruned).requires_grad_(), CrossEntropy(), [(images, labels)])
        with torch.no_grad():
            classes = [pruned(inputs).argmax(1) for inputs in (images, ATTACK.on(objective)[0][0])]
        return float((classes[0] == labels).double().mean()), float((classes[1] == labels).double().mean())

    yield "\nDense: {:.3f} of clean images right, {:.3f} under attack\n".format(*found(model))
    yield "| score | share | clean | attacked |\n|---|---|---|---|"
    for share in (0.2, 0.3, 0.5, 0.7):
        for score, scope in (
            ("random", "network"),
            ("magnitude", "network"),
            ("magnitude", "site"),
            ("obd", "network"),
            ("mad", "network"),
            ("mad", "site"),
            ("m-fac-network", "network"),
        ):
            result = hesse.prune(
                model, data=data, what="weights", method=score, sparsity=share, scope=scope, attack=ATTACK
            )
            clean, attacked = found(result.model)
            yield f"| {score}, share of {scope} | {share:.0%} | {clean:.3f} | {attacked:.3f} |"


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="digits,language,robust")
    parser.add_argument("--scores", default="", help="names of rows, with a semicolon between two")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.scores.split(";") if name]
    for part in arguments.only.split(","):
        lines = robust() if part == "robust" else table({"digits": on_digits, "language": on_language}[part](), chosen)
        for line in lines:
            print(line, flush=True)
    print("\n", limits())


if __name__ == "__main__":
    main()
