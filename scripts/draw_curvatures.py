"""Draw each curvature beside the exact matrix that it stands for: python scripts/draw_curvatures.py docs/curvatures."""

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from PIL import Image
from torch import Tensor, nn

from hesse.curvature import (
    BlockDiagonal,
    BlockRankOneSum,
    Curvature,
    Diagonal,
    EigenKronecker,
    Fisher,
    GaussNewton,
    Gram,
    Hessian,
    Identity,
    Kronecker,
    Objective,
    RankOneSum,
    Scaled,
    Sum,
    UserLoss,
)
from hesse.estimation import per_sample_gradients

INPUTS, HIDDEN, CLASSES, POSITIONS = 6, 8, 3, 5
DRAWS = 64  # labels drawn for each term, for factors whose own noise does not show
DECADES = 4  # of entries that have a colour


@dataclass(frozen=True)
class Panel:
    """A matrix and what is written above it."""

    title: str
    matrix: Tensor

    @classmethod
    def near(cls, title: str, matrix: Tensor, truth: Tensor) -> "Panel":
        """With the relative Frobenius distance to `truth` in its title."""
        return cls(f"{title}\ndistance {float((matrix - truth).norm() / truth.norm()):.2f}", matrix)


class Pooled(nn.Module):
    """One layer on each position; then the mean over positions, or one output a position."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.first = nn.Linear(INPUTS, HIDDEN, bias=False)
        self.second = nn.Linear(HIDDEN, CLASSES, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.first(inputs))
        result: Tensor = self.second(hidden.mean(1) if self.pool else hidden)
        return result


def correlated(*shape: int) -> Tensor:
    """Inputs of several sizes that correlate, as those of a real layer do."""
    mixing = torch.eye(INPUTS) + 0.6 * torch.randn(INPUTS, INPUTS)
    return torch.randn(*shape, INPUTS) @ mixing * torch.logspace(0, -0.7, INPUTS)


def trained(model: nn.Module, inputs: Tensor, steps: int = 60) -> Objective:
    """The objective of `model` after some training on the noisy labels of a teacher."""
    with torch.no_grad():
        teacher = torch.randn(INPUTS, CLASSES)
        scores = model(inputs)
        pooled = inputs.mean(1) if scores.ndim < inputs.ndim else inputs
        noise = torch.distributions.Gumbel(0.0, 1.0).sample(scores.shape)
        labels = ((pooled * 1.5).sin() @ teacher * 3 + 1.5 * noise).argmax(-1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return Objective.of(model, nn.CrossEntropyLoss(), [(inputs, labels)])


def part(objective: Objective, *names: str) -> Objective:
    """The same objective over some of its parameters."""
    return Objective.of(objective.model, objective.loss, objective.data, names)


def flow(objective: Objective, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What reaches `layer`, and the gradients at what it gives for labels drawn from the model: (samples, ..., width).

    The gradients are in the unit of the objective's loss: their squares, summed over positions, average to it.
    """
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, arguments, output: seen.extend((arguments[0].detach(), output)))
    ((inputs, _),) = list(objective.data)
    outputs = objective.model(inputs.repeat_interleave(DRAWS, 0))
    hook.remove()
    labels = torch.distributions.Categorical(logits=outputs.detach()).sample()
    loss = nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="sum")
    (gradients,) = torch.autograd.grad(loss, seen[1])
    return seen[0], gradients * (len(labels) / labels.numel()) ** 0.5


def second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def best_multiple(curvature: Curvature, truth: Tensor, matrix: Tensor) -> Tensor:
    """The multiple of `matrix` nearest to `truth`, for curvatures whose unit is another."""
    multiple = Scaled(original=curvature, factor=float((matrix * truth).sum() / matrix.square().sum()))
    return matrix * multiple.factor


def draw(path: Path, rows: Sequence[Sequence[Panel]], borders: Sequence[tuple[str, int]] = ()) -> None:
    """Rows of |H| on one logarithmic colour scale a row; what is exactly zero is white."""
    wide = max(len(panels) for panels in rows)
    figure, axes = plt.subplots(
        len(rows), wide, figsize=(2.5 * wide + 0.6, 2.9 * len(rows)), squeeze=False, layout="constrained"
    )
    for places, panels in zip(axes, rows, strict=True):
        top = max(float(panel.matrix.abs().max()) for panel in panels)
        norm = LogNorm(vmin=top * 10**-DECADES, vmax=top)
        for place, panel in zip(places, panels, strict=True):
            sizes = panel.matrix.abs()
            seen = np.ma.masked_array(sizes.clamp(min=norm.vmin).numpy(), (sizes < 1e-12 * top).numpy())
            image = place.imshow(seen, norm=norm, cmap=COLOURS, interpolation="nearest")
            place.set_title(panel.title, fontsize=9)
            _mark(place, borders)
        bar = figure.colorbar(image, ax=list(places), shrink=0.8, pad=0.01)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("size of an entry; white: zero", fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def _palette() -> Image.Image:
    """The map's own colours and some greys: a byte a pixel, and nothing else is in these pictures."""
    colours = [COLOURS(index, bytes=True)[:3] for index in range(COLOURS.N)]
    greys = [(grey,) * 3 for grey in range(0, 256, 17)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([int(value) for colour in (*colours, *greys) for value in colour])
    return palette


def _mark(place: Axes, borders: Sequence[tuple[str, int]]) -> None:
    """Lines between parameters, and their names on the left."""
    start, middles = 0, []
    for _, size in borders:
        middles.append(start + size / 2 - 0.5)
        start += size
        if start < sum(size for _, size in borders):
            place.axhline(start - 0.5, color="black", linewidth=0.4)
            place.axvline(start - 0.5, color="black", linewidth=0.4)
    place.set_xticks([])
    place.set_yticks(middles, [name for name, _ in borders], fontsize=7)
    place.tick_params(length=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    torch.set_default_dtype(torch.float64)
    whole_network(folder, mlp())
    one_layer(folder, part(mlp(), "0.weight"))
    kinds(folder)
    positions(folder)


def mlp(steps: int = 60) -> Objective:
    """The network of most pictures, with 83 parameters, and its data: the same for the same number of steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, CLASSES))
    return trained(model, correlated(512), steps)


def kinds(folder: Path) -> None:
    """The exact matrices of the first weight, before and after training."""
    rows = []
    for steps, when in ((0, "before training"), (60, "after training")):
        objective = part(mlp(steps), "0.weight")
        hessian = Hessian(objective=objective).matrix()
        newton = GaussNewton(objective=objective).matrix()
        sampled, empirical = (Fisher(objective=objective, kind=kind).matrix() for kind in ("sampled", "empirical"))
        rows.append(
            [
                Panel(f"Hessian\n{when}", hessian),
                Panel.near("GaussNewton = exact Fisher", newton, hessian),
                Panel.near("Fisher, sampled", sampled, hessian),
                Panel.near("Fisher, empirical", empirical, hessian),
            ]
        )
    draw(folder / "exact.png", rows)


def whole_network(folder: Path, objective: Objective) -> None:
    """Curvatures on all 83 parameters."""
    borders = [(name, p.numel()) for name, p in zip(("W₁", "b₁", "W₂", "b₂"), objective.parameters, strict=True)]
    fisher = Fisher(objective=objective, kind="exact").matrix()
    truth = Panel("exact Fisher", fisher)
    one = torch.eye(len(fisher))
    diagonal = Diagonal(values=fisher.diagonal().clone())
    draw(
        folder / "identity-and-diagonal.png",
        [
            [
                truth,
                Panel.near("Identity, its best multiple", best_multiple(Identity(), fisher, one), fisher),
                Panel.near("Diagonal", diagonal.matrix(), fisher),
            ]
        ],
        borders,
    )
    gradients = torch.cat(list(per_sample_gradients(objective, "sampled")))
    sums = {m: RankOneSum.from_gradients(gradients[:m]) for m in (8, 64, 512)}
    near = [Panel.near(f"RankOneSum, m = {m}", each.matrix(), fisher) for m, each in sums.items()]
    draw(folder / "rank-one-sum.png", [[truth, *near]], borders)
    blocks = {size: BlockRankOneSum.from_gradients(gradients, size) for size in (6, 24, 48)}
    near = [Panel.near(f"blocks of {size}", each.matrix(), fisher) for size, each in blocks.items()]
    draw(folder / "block-rank-one-sum.png", [[truth, *near]], borders)
    layers: dict[str, Curvature] = {}
    for name in ("0", "2"):
        inputs, outputs = flow(objective, objective.model.get_submodule(name))
        layers[f"{name}.weight"] = Kronecker(output_factor=second_moment(outputs), input_factor=second_moment(inputs))
        layers[f"{name}.bias"] = Gram(second_moment=second_moment(outputs), tokens=len(outputs))
    shapes = {name: tuple(p.shape) for name, p in zip(objective.names, objective.parameters, strict=True)}
    by_layer = BlockDiagonal(blocks=layers, shapes=shapes)
    mixed = Sum(terms=(Scaled(original=by_layer, factor=0.5), Scaled(original=sums[64], factor=0.5)))
    draw(
        folder / "composite.png",
        [
            [
                truth,
                Panel.near("BlockDiagonal of\nKronecker and Gram", by_layer.matrix(), fisher),
                Panel.near("half of it, and half a\nRankOneSum, m = 64", mixed.matrix(), fisher),
            ]
        ],
        borders,
    )


def one_layer(folder: Path, objective: Objective) -> None:
    """Curvatures of the first weight, (8, 6)."""
    truth = Fisher(objective=objective, kind="exact").matrix()
    layer = objective.model.get_submodule("0")
    inputs, outputs = flow(objective, layer)
    gram = Gram.from_inputs(inputs)
    alone = nn.Linear(INPUTS, HIDDEN, bias=False)
    loss = UserLoss(function=lambda outputs, targets: 0.5 * (outputs - targets).square().sum(-1))
    ((rows, _),) = list(objective.data)
    local = Hessian(objective=Objective.of(alone, loss, [(rows, alone(rows).detach())])).matrix()
    full = torch.block_diag(*[gram.matrix()] * HIDDEN)
    scale = local.abs().max() / truth.abs().max()
    draw(
        folder / "gram.png",
        [
            [
                Panel("Hessian of ½‖Wx - W₀x‖²", local),
                Panel.near("Gram", full, local),
                Panel("exact Fisher of the loss,\nbrought to that scale", truth * scale),
                Panel.near("Gram, its best multiple", best_multiple(gram, truth * scale, full), truth * scale),
            ]
        ],
    )
    kronecker = Kronecker(output_factor=second_moment(outputs), input_factor=second_moment(inputs))
    gradients = outputs[:, :, None] * inputs[:, None, :]
    eigen = EigenKronecker.from_gradients(kronecker, gradients)
    draw(
        folder / "kronecker.png",
        [
            [
                Panel("exact Fisher", truth),
                Panel.near("Kronecker", kronecker.matrix(), truth),
                Panel.near(
                    "Kronecker, diagonal G",
                    Kronecker(
                        output_factor=kronecker.output_factor.diagonal(), input_factor=kronecker.input_factor
                    ).matrix(),
                    truth,
                ),
            ]
        ],
    )
    basis = torch.kron(*(torch.linalg.eigh(f).eigenvectors for f in (kronecker.output_factor, kronecker.input_factor)))
    draw(
        folder / "eigen-kronecker.png",
        [
            [
                Panel("exact Fisher", truth),
                Panel.near("Kronecker", kronecker.matrix(), truth),
                Panel.near("EigenKronecker", eigen.matrix(), truth),
                Panel("exact Fisher in their\neigenvectors' basis", basis.T @ truth @ basis),
            ]
        ],
    )


def positions(folder: Path) -> None:
    """K-FAC expand and reduce where a sample has several positions, with one loss a sample and with one a position."""
    torch.manual_seed(0)
    rows = []
    for pool, what in ((True, "exact Fisher\none loss a sample"), (False, "exact Fisher\none loss a position")):
        model = Pooled(pool)
        sequences = 0.7 * correlated(512, 1) + 0.7 * correlated(512, POSITIONS)
        objective = trained(model, sequences)
        truth = Fisher(objective=part(objective, "first.weight"), kind="exact").matrix()
        inputs, outputs = flow(objective, model.first)
        expand = Kronecker(
            output_factor=second_moment(outputs.flatten(0, 1)) * POSITIONS,
            input_factor=second_moment(inputs.flatten(0, 1)),
        )
        reduce = Kronecker(output_factor=second_moment(outputs.sum(1)), input_factor=second_moment(inputs.mean(1)))
        rows.append(
            [
                Panel(what, truth),
                Panel.near("expand", expand.matrix(), truth),
                Panel.near("reduce", reduce.matrix(), truth),
            ]
        )
    draw(folder / "kronecker-positions.png", rows)


matplotlib.use("Agg")
COLOURS = matplotlib.colormaps["viridis"].resampled(96).with_extremes(bad="white")

if __name__ == "__main__":
    main()
