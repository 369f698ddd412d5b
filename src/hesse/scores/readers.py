"""The layers that read groups, as matrices whose columns go with them, and their Kronecker curvatures."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesse.curvature import Curvature, Kronecker, Objective
from hesse.errors import UnsupportedModelError
from hesse.estimation import estimate_curvatures
from hesse.networks.narrow_attention import outputs_called
from hesse.partitions import Group
from hesse.partitions.experts import with_linear_experts
from hesse.partitions.groups import Slice


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer as a matrix (out, in · positions of a kernel), and which of its columns go with each group of a site.

    G is E[ggᵀ] of the gradients of the loss at its outputs, A = E[xxᵀ] of its inputs.
    """

    parameter: str
    stack: int | None
    weight: Tensor  # float64
    output_factor: Tensor
    input_factor: Tensor
    columns: list[Tensor]  # one a group

    def write(self, model: nn.Module, weight: Tensor) -> None:
        """Put a changed matrix into a model's parameter."""
        parameter = dict(model.named_parameters())[self.parameter].data
        target = parameter if self.stack is None else parameter[self.stack]
        target.copy_(weight.T if _is_conv1d(model, self.parameter) else weight.view_as(target))


def find_readers(objective: Objective, sites: Iterable[Sequence[Group]], seed: int) -> list[list[Reader]]:
    """The readers of each site's groups, with curvatures from one pass of the true Fisher with sampled labels.

    Raises:
        UnsupportedModelError: what reads a group is not a linear or convolutional layer.
    """
    sites = list(sites)
    model = with_linear_experts(objective.model)
    names = {_name(piece): None for site in sites for group in site for piece in group.read}
    parameters = dict(model.named_parameters())
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and not _is_conv1d(model, name):
            raise UnsupportedModelError(
                f"{name} is no weight of a linear or convolutional layer, which a curvature could be estimated of: "
                "choose another method or other kinds"
            )
        parameters[name].requires_grad_(True)
    chosen = Objective(model, objective.loss, objective.data, tuple(names), objective.forward)
    with outputs_called(model):
        factors = estimate_curvatures(chosen, ["kronecker"], seed=seed).kronecker
    return [_readers_of(model, site, factors) for site in sites]


def _readers_of(model: nn.Module, site: Sequence[Group], factors: Mapping[str, Curvature]) -> list[Reader]:
    pieces: dict[tuple[str, str, int | None], dict[int, Slice]] = defaultdict(dict)
    for number, group in enumerate(site):
        for piece in group.read:
            pieces[_name(piece), piece.parameter, piece.stack][number] = piece
    found = []
    for (name, parameter, stack), slices in pieces.items():
        curvature = factors[name]
        assert isinstance(curvature, Kronecker)
        weight = dict(model.named_parameters())[name].detach().double()
        weight = weight.T if _is_conv1d(model, name) else weight
        repeats = weight[0, 0].numel()
        columns = [_columns(slices[number], repeats, weight.device) for number in range(len(site))]
        outputs, inputs = curvature.output_factor, curvature.input_factor
        found.append(Reader(parameter, stack, weight.flatten(1), outputs.double(), inputs.double(), columns))
    return found


def _columns(piece: Slice, repeats: int, device: torch.device) -> Tensor:
    starts = torch.tensor(piece.indices, device=device)[:, None] * repeats
    return (starts + torch.arange(repeats, device=device)).flatten()


def _name(piece: Slice) -> str:
    """The parameter of a slice, where experts are linear layers."""
    if piece.stack is None:
        return piece.parameter
    parent, _, key = piece.parameter.rpartition(".")
    return f"{parent}.{piece.stack}.{key}.weight"


def _is_conv1d(model: nn.Module, name: str) -> bool:
    """True if a parameter is the weight of transformers' Conv1D, which is (in, out)."""
    module = model.get_submodule(name.rpartition(".")[0])
    return hasattr(module, "nf") and hasattr(module, "nx")
