"""Structured pruning in small: what each way of choosing groups costs, measured, at three shares.

    PYTHONPATH=src python bench/structured.py [conv] [hap] [hidden] [heads] [moe] [once] [axformer]

Prints tables in Markdown. `conv`: channels of a residual network on scikit-learn's digits; `hap`: an implant there;
`hidden` and `heads`: of the default model; `moe`: a tiny mixture of experts on random chains; `once`: Only Train Once;
`axformer`: parts, heads and hidden units by measured loss.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.curvature import CrossEntropy, Objective
from hesse.curvature.losses import next_tokens
from hesse.data import read_samples
from hesse.modules.implant import Implant
from hesse.modules.report import PruneReport
from hesse.training import Training, finetune

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import digits

Batches = list[tuple[Any, Tensor]]
SHARES = (0.1, 0.25, 0.4)
METHODS = ("random", "magnitude", "taylor", "fisher", "hap", "heapr", "obs")
HALF = (0.5,)  # of the heads of the default model, which has two of keys and values a layer


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a model of transformers."""
    result: Tensor = model(input_ids=ids).logits
    return result


def pruned(model: nn.Module, data: Batches, **options: Any) -> tuple[nn.Module, PruneReport]:
    """A smaller network, and the report of it."""
    result = hesse.prune(model, data=data, **{"what": "groups", **options})
    return result.model, result.report


def loss(model: nn.Module, data: Batches, forward: Callable[[nn.Module, Any], Tensor] | None = None) -> float:
    """The mean loss on held-out data."""
    return Objective.of(model, CrossEntropy(), data, [next(model.named_parameters())[0]], forward).value()


def table(
    title: str,
    model: nn.Module,
    data: Batches,
    held_out: Batches,
    methods: list[dict[str, Any]],
    shares: tuple[float, ...],
    **common: Any,
) -> None:
    """Print the rise of the held-out loss by method and share."""
    forward = common.get("forward")
    dense = loss(model, held_out, forward)
    print(f"\n**{title}**: {sum(p.numel() for p in model.parameters())} parameters, held-out loss {dense:.4f}\n")
    print("| method | " + " | ".join(f"{share:.0%} gone" for share in shares) + " | seconds |")
    print("|---" * (len(shares) + 2) + "|")
    sizes: dict[float, str] = {}
    for method in methods:
        cells, started = [], time.perf_counter()
        for share in shares:
            smaller, report = pruned(model, data, **{**common, **method, "keep": 1 - share})
            cells.append(f"{loss(smaller, held_out, forward) - dense:+.4f}")
            assert report.difference < 1e-4, "zeroing is not slicing"
            if method.get("scope") != "network" and method["method"] == "random":
                kept = report.parameters_after / report.parameters_before, report.flops_after / report.flops_before
                sizes[share] = f"{kept[0]:.0%} of parameters, {kept[1]:.0%} of flops"
        name = f"`{method['method']}`" + (", refit" if method.get("refit") else "")
        name += ", one ranking" if method.get("scope") == "network" else ""
        print(
            f"| {name} | " + " | ".join(cells) + f" | {(time.perf_counter() - started) / len(shares):.1f} |", flush=True
        )
    print("| left | " + " | ".join(sizes[share] for share in shares) + " | |")


def every(*names: str) -> list[dict[str, Any]]:
    """The methods at their own choice, the two floors with a refit too, and the surgeon with one ranking."""
    own = [{"method": name} for name in names]
    return [
        *own,
        {"method": "random", "refit": "least-squares"},
        {"method": "magnitude", "refit": "least-squares"},
        {"method": "obs", "scope": "network"},
    ]


def conv() -> None:
    """Channels of a convolution net: scores, and PAGCP's tolerance."""
    model, test = digits.trained("conv"), digits.batches("test")
    data = digits.batches(samples=256)
    table("Digits, residual network: channels", model, data, test, every(*METHODS), SHARES)
    dense = loss(model, test)
    print("\n| pagcp: tolerance | loss rises by | held-out | parameters left |\n|---|---|---|---|")
    for tolerance in (0.02, 0.1, 0.3):
        smaller, report = pruned(model, data, method="pagcp", keep=0.2, loss=tolerance)
        left = report.parameters_after / report.parameters_before
        rise = report.loss_after - report.loss_before, loss(smaller, test) - dense
        print(f"| {tolerance} | {rise[0]:+.4f} | {rise[1]:+.4f} | {left:.0%} |")


def hap() -> None:
    """Middling channels kept, as a low rank, or gone."""
    model, test = digits.trained("conv"), digits.batches("test")
    data, dense = digits.batches(samples=256), loss(digits.trained("conv"), test)
    print("\n| hap, 10 % gone, the next 30 % | held-out | parameters left | after 100 steps of recovery |")
    print("|---|---|---|---|")
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("kept", {"keep": 0.9}),
        ("an implant of rank 2", {"keep": 0.9, "implant": Implant(0.3, 2)}),
        ("gone too", {"keep": 0.6}),
    )
    for name, options in cases:
        smaller, report = pruned(model, data, method="hap", **options)
        after = loss(smaller, test) - dense
        finetune(smaller, digits.batches(), Training(steps=100), loss_function=CrossEntropy(), held={})
        left = report.parameters_after / report.parameters_before
        print(f"| {name} | {after:+.4f} | {left:.0%} | {loss(smaller, test) - dense:+.4f} |")


def text(samples: int, held_out: bool) -> Batches:
    """Windows of 128 tokens of the shipped texts."""
    purpose: Any = "evaluation" if held_out else "calibration"
    found, _ = read_samples(None, DEFAULT_FOLDER, count=samples, length=128, seed=0, purpose=purpose, limit=None)
    ids = torch.stack(list(found.ids))
    return [(part, next_tokens(part)) for part in ids.split(8)]


def lm(kind: str, shares: tuple[float, ...]) -> None:
    """Hidden units or heads of the default model."""
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32, trust_remote_code=False).eval()
    data, test = text(16, False), text(24, True)
    names = [name for name in METHODS if name != "hap"]
    table(f"Default model: {kind}", model, data, test, every(*names), shares, what=kind, forward=logits)


def chains(samples: int, seed: int) -> Batches:
    """Sequences of 32 numbers below 128: nine in ten follow from the two before them by a random table."""
    table = torch.randint(0, 128, (4, 128), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (samples, 32), generator=generator)
    free = torch.rand(ids.shape, generator=generator) < 0.1
    for place in range(2, 32):
        ids[:, place] = torch.where(free[:, place], ids[:, place], table[ids[:, place - 2] % 4, ids[:, place - 1]])
    return [(part, next_tokens(part)) for part in ids.split(32)]


def mixture() -> nn.Module:
    """A tiny Mixtral, trained for seconds."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **{"vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    )
    model, data, steps = MixtralForCausalLM(config), chains(32 * 100, 1), 500
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        ids, targets = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(model, ids).flatten(0, 1), targets.flatten()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.step()
    return model.eval()


def moe() -> None:
    """Hidden units of experts, and whole experts."""
    model, data, test = mixture(), chains(128, 2), chains(256, 3)
    names = [name for name in METHODS if name not in ("hap", "fisher")]
    methods = [*every(*names), {"method": "heapr", "scope": "network"}]
    table(
        "A mixture of experts: hidden units of experts",
        model,
        data,
        test,
        methods,
        SHARES,
        what="hidden",
        forward=logits,
    )
    whole = [{"method": name} for name in ("random", "magnitude", "taylor", "fisher")]
    table("The same: whole experts", model, data[:1], test, whole, SHARES, what="experts", forward=logits)


def once() -> None:
    """Only Train Once, and plain training before pruning as much."""
    data, test = digits.batches(), digits.batches("test")
    print("\n| 600 steps from the trained `mlp` | held-out loss | parameters left | zeroed against sliced |")
    print("|---|---|---|---|")
    for penalty in (0.01, 0.03, 0.06):
        smaller, report = pruned(
            digits.trained("mlp"), data, method="only-train-once", steps=600, rate=0.2, penalty=penalty
        )
        share = 1 - sum(g for g, _ in report.removed.values()) / sum(n for _, n in report.removed.values())
        left = report.parameters_after / report.parameters_before
        print(f"| Only Train Once, λ {penalty} | {loss(smaller, test):.4f} | {left:.0%} | {report.difference:.1e} |")
        for method in ("magnitude", "obs"):
            model = digits.trained("mlp").train()
            training = Training(steps=600, optimizer=sgd, clip=None)
            finetune(model, data, training, loss_function=CrossEntropy(), held={})
            after, again = pruned(model.eval(), data, method=method, keep=share)
            left = again.parameters_after / again.parameters_before
            print(f"| plain, then `{method}` | {loss(after, test):.4f} | {left:.0%} | {again.difference:.1e} |")


def axformer() -> None:
    """AxFormer on the vision transformer, PAGCP at the same tolerance, the surgeon at the same size."""
    model, test = digits.trained("vit"), digits.batches("test")
    data = digits.batches()
    dense = loss(model, test), digits.accuracy(model)
    print(f"\nheld-out loss {dense[0]:.4f}, accuracy {dense[1]:.3f}\n")
    print("| tolerance, method | loss rises by | held-out | accuracy | parameters left | flops left | seconds |")
    print("|---|---|---|---|---|---|---|")

    def show(name: str, options: dict[str, Any]) -> float:
        started = time.perf_counter()
        smaller, report = pruned(model, data, **options)
        seconds = time.perf_counter() - started
        left, flops = report.parameters_after / report.parameters_before, report.flops_after / report.flops_before
        rise = report.loss_after - report.loss_before, loss(smaller, test) - dense[0]
        print(
            f"| {name} | {rise[0]:+.4f} | {rise[1]:+.4f} | {digits.accuracy(smaller):.3f} | {left:.0%} | {flops:.0%} | "
            f"{seconds:.1f} |",
            flush=True,
        )
        return left

    half = pruned(model, data, method="magnitude", keep=0.5)[1]
    inside = 2 * (1 - half.parameters_after / half.parameters_before)  # the share of the parameters that is in groups
    for tolerance in (0.0, 0.02, 0.1, 0.3):
        left = show(f"{tolerance}, `axformer`", {"method": "axformer", "loss": tolerance})
        show(f"{tolerance}, `pagcp`", {"method": "pagcp", "keep": 0.2, "loss": tolerance})
        if left < 1:
            show(f"{tolerance}, `obs` at that size", {"method": "obs", "keep": 1 - (1 - left) / inside})


def sgd(named: Any) -> torch.optim.Optimizer:
    """What Only Train Once does without its penalty."""
    return torch.optim.SGD([parameter for _, parameter in named], lr=0.2)


if __name__ == "__main__":
    torch.set_num_threads(2)
    parts = {"conv": conv, "hap": hap, "hidden": partial(lm, "hidden", SHARES), "heads": partial(lm, "heads", HALF)}
    parts |= {"moe": moe, "once": once, "axformer": axformer}
    for part in sys.argv[1:] or parts:
        parts[part]()
