"""What narrower heads cost: the two parts of MoDeGPT (Lin et al., 2024) that no config.json can say.

    python bench/narrow_heads.py [--model FOLDER]

Queries and keys lose pairs of rotary dimensions by the products of their norms in the metric of the layer's inputs
(CR), values and outputs the directions that an SVD of the outputs' weights in the metric of the values finds least of,
with what reads them refitted. Both as zeros in the dense model's shapes, which gives what narrower heads would give.
Prints KL(dense || changed) in nats per token on held-out text. For Llama and models with the same names. Then
Narrower heads by `hesse.prune` in a transformer of torch's own layers, beside as many parameters' worth of whole heads
removed.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import limits
from torch import Tensor, nn

import hesse
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.curvature import CrossEntropy, Objective
from hesse.data import read_samples
from hesse.solvers.linear.nystroem import nystroem_weight

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import digits

SHARES = (0.75, 0.5, 0.25)
SAMPLES, LENGTH = 32, 128


class Subject:
    """A model in memory, its attentions, and E[xxᵀ] of what their queries and outputs read."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.attentions: list[nn.Module] = [block.self_attn for block in self.model.model.layers]
        config = self.model.config
        self.head = config.head_dim
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        shipped = folder == DEFAULT_FOLDER
        texts = (None, None) if shipped else (folder / "calibration.txt", folder / "held_out.txt")
        calibration, self.held_out = (
            torch.stack(
                read_samples(text, folder, count=SAMPLES, length=LENGTH, seed=0, purpose=purpose, limit=None)[0].ids
            )
            for text, purpose in zip(texts, ("calibration", "evaluation"), strict=True)
        )
        self.moments: dict[nn.Module, Tensor] = {}
        watched = [layer for attention in self.attentions for layer in (attention.q_proj, attention.o_proj)]
        hooks = [layer.register_forward_pre_hook(self._note) for layer in watched]
        self.outputs(calibration)
        for hook in hooks:
            hook.remove()
        self.dense = self.outputs(self.held_out)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        flat = inputs[0].flatten(0, -2).double()
        self.moments[layer] = flat.T @ flat / len(flat)

    @torch.no_grad()
    def outputs(self, ids: Tensor) -> Tensor:
        """Log-probabilities (samples, tokens, vocabulary)."""
        return self.model(input_ids=ids).logits.log_softmax(-1)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The weights as they are now, afterwards."""
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        try:
            yield
        finally:
            self.model.load_state_dict(before)

    def divergence(self) -> float:
        """KL(dense || the model as it is)."""
        changed = self.outputs(self.held_out)
        return float((self.dense.exp() * (self.dense - changed)).sum(-1)[:, :-1].mean())

    def norms(self, weight: Tensor, moment: Tensor, heads: int) -> Tensor:
        """E of the squared outputs (heads, pairs) of each rotary pair, whose dimensions are half a head apart."""
        squares = ((weight.double() @ moment) * weight).sum(1)
        return squares.view(heads, 2, self.head // 2).sum(1)


def products(subject: Subject) -> Tensor:
    """CR: E‖q_p‖² E‖k_p‖² (attentions, keys, pairs), summed over the queries of a key."""
    found = []
    for attention in subject.attentions:
        moment = subject.moments[attention.q_proj]
        keys = subject.norms(attention.k_proj.weight, moment, subject.keys)
        queries = subject.norms(attention.q_proj.weight, moment, subject.queries)
        found.append(keys * queries.view(subject.keys, -1, subject.head // 2).sum(1))
    return torch.stack(found)


def weights_alone(subject: Subject) -> Tensor:
    """The same products without data: the norms of the weights."""
    identity = torch.eye(subject.attentions[0].q_proj.in_features, dtype=torch.float64)
    held = subject.moments
    subject.moments = dict.fromkeys(held, identity)
    try:
        return products(subject)
    finally:
        subject.moments = held


def at_random(subject: Subject) -> Tensor:
    """The floor."""
    shape = (len(subject.attentions), subject.keys, subject.head // 2)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def one_choice(score: Callable[[Subject], Tensor]) -> Callable[[Subject], Tensor]:
    """The same pairs for all heads, as one set of rotary frequencies in config.json would have it."""

    def shared(subject: Subject) -> Tensor:
        own = score(subject).sqrt()
        return (own / own.sum(-1, keepdim=True)).mean((0, 1), keepdim=True).expand_as(own)

    return shared


@torch.no_grad()
def without_pairs(subject: Subject, scores: Tensor, share: float) -> None:
    """Zero the keys' dimensions of the pairs with the lowest scores, so that their queries count for nothing."""
    kept = round(share * scores.shape[-1])
    for attention, own in zip(subject.attentions, scores, strict=True):
        mask = torch.zeros(own.shape).scatter(1, own.topk(kept).indices, 1.0)
        attention.k_proj.weight *= torch.cat([mask, mask], 1).view(-1, 1)


@torch.no_grad()
def without_directions(subject: Subject, share: float, *, whitened: bool) -> None:
    """Values of fewer dimensions for each key, and the outputs' weights on these, nystroem_weight over all heads."""
    size, kept, fold = subject.head, round(share * subject.head), subject.queries // subject.keys
    for attention in subject.attentions:
        reader, moment = attention.o_proj.weight.double(), subject.moments[attention.o_proj]
        maps = []
        for key in range(subject.keys):
            heads = [slice(head * size, (head + 1) * size) for head in range(key * fold, (key + 1) * fold)]
            own = sum(moment[head, head] for head in heads) if whitened else torch.eye(size, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(own)
            root = values.clamp(min=values[-1] * 1e-9).sqrt()
            stacked = torch.cat([reader[:, head] for head in heads]) @ (vectors * root)
            directions = torch.linalg.svd(stacked)[2][:kept]
            rows = slice(key * size, (key + 1) * size)
            found = attention.v_proj.weight[rows].double()
            made = torch.zeros_like(found)
            made[:kept] = directions @ (vectors / root).T @ found
            attention.v_proj.weight[rows] = made.to(attention.v_proj.weight)
            smaller = torch.zeros(size, size, dtype=torch.float64)
            smaller[:kept] = directions @ (vectors / root).T
            maps += [smaller] * fold
        narrow = torch.block_diag(*maps)
        read = torch.arange(size * subject.queries).view(-1, size)[:, :kept].flatten()
        joint = torch.cat(
            [torch.cat([moment, moment @ narrow.T], 1), torch.cat([narrow @ moment, narrow @ moment @ narrow.T], 1)]
        )
        whole = torch.cat([reader, torch.zeros_like(reader)], 1)
        attention.o_proj.weight.zero_()
        attention.o_proj.weight[:, read] = nystroem_weight(whole, joint, len(moment) + read).to(attention.o_proj.weight)


PARTS: dict[str, Callable[[Subject, float], None]] = {
    "queries and keys: pairs by CR, each head its own": lambda subject, share: without_pairs(
        subject, products(subject), share
    ),
    "by norms of the weights": lambda subject, share: without_pairs(subject, weights_alone(subject), share),
    "at random": lambda subject, share: without_pairs(subject, at_random(subject), share),
    "by CR, the same for all heads": lambda subject, share: without_pairs(
        subject, one_choice(products)(subject), share
    ),
    "values and outputs: SVD in the metric of the values": lambda subject, share: without_directions(
        subject, share, whitened=True
    ),
    "plain SVD of the outputs' weights": lambda subject, share: without_directions(subject, share, whitened=False),
}


class Reader(nn.Module):
    """Digits line by line, through torch's own encoder."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lines = nn.Linear(8, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.encoder(self.lines(images.flatten(1).view(-1, 8, 8)) + self.places)
        result: Tensor = self.head(hidden.mean(1))
        return result


def on_digits() -> None:
    """Print the second table."""
    torch.manual_seed(0)
    model, (images, labels) = Reader(), digits.digits()[0]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for chosen in torch.randperm(len(labels)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
    calibration, held_out = digits.batches(samples=512), digits.batches("test")

    def loss(network: nn.Module) -> float:
        objective = Objective.of(network.eval().requires_grad_(), CrossEntropy(), held_out)
        return objective.value()

    dense = loss(model)
    print(f"\n| held-out loss, {dense:.3f} before; of the attention's weights | 75% left | 50% left | 25% left |")
    print("|---|---|---|---|")

    def pruned(what: str, **options: Any) -> nn.Module:
        return hesse.prune(model, data=calibration, what=what, **options).model

    ways: dict[str, Callable[[float], nn.Module]] = {
        "narrower heads": lambda share: pruned("head-dimensions", keep=share),
        "whole heads, `obs`": lambda share: pruned("heads", keep=share),
        "whole heads, `random`, refit": lambda share: pruned(
            "heads", method="random", refit="least-squares", keep=share
        ),
        "whole heads, `random`": lambda share: pruned("heads", method="random", keep=share),
    }
    for name, way in ways.items():
        print(f"| {name} | " + " | ".join(f"+{loss(way(share)) - dense:.3f}" for share in SHARES) + " |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER)
    subject = Subject(parser.parse_args().model)
    print(f"| of a head's {subject.head} dimensions | " + " | ".join(f"{share:.0%} left" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    for name, change in PARTS.items():
        cells = []
        for share in SHARES:
            with subject.restored():
                change(subject, share)
                cells.append(f"{subject.divergence():.2g}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    on_digits()
    print("\n", limits())


if __name__ == "__main__":
    main()
