"""Every partition keeps the laws of partitions; what is none is refused."""

import pytest
import torch
from torch import Tensor, nn

from hesse.errors import OptionError
from hesse.partitions import GroupParts, ParameterSets, Partition, Tiles, check_slicing, trace_groups, zeroed_outputs
from hesse.partitions.group_parts import ROLES
from hesse.testing import PartitionLaws, normal

SHAPES = {"first": torch.Size((4, 12)), "second": torch.Size((8, 2, 2, 3)), "bias": torch.Size((4,))}
MATRICES = {name: shape for name, shape in SHAPES.items() if name != "bias"}


class TestWeights(PartitionLaws):
    covers = tuple(SHAPES)

    def build(self) -> Partition:
        return Tiles(SHAPES)


class TestBlocksOfFour(PartitionLaws):
    covers = tuple(MATRICES)

    def build(self) -> Partition:
        return Tiles(MATRICES, (1, 4))


class TestSquareTiles(PartitionLaws):
    covers = tuple(MATRICES)

    def build(self) -> Partition:
        return Tiles(MATRICES, (4, 4))


class TestRows(PartitionLaws):
    covers = tuple(SHAPES)

    def build(self) -> Partition:
        return Tiles(SHAPES, (1, None))


class TestColumns(PartitionLaws):
    covers = tuple(SHAPES)

    def build(self) -> Partition:
        return Tiles(SHAPES, (None, 1))


class TestLayers(PartitionLaws):
    covers = tuple(SHAPES)

    def build(self) -> Partition:
        return Tiles(SHAPES, (None, None))


class TestBlocks(PartitionLaws):
    covers = tuple(SHAPES)

    def build(self) -> Partition:
        return ParameterSets(SHAPES, [("first", "bias"), ("second",)])


class Network(nn.Module):
    """Two hidden layers, and their traced hidden units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.layers(inputs)
        return result


class GroupLaws(PartitionLaws):
    inputs = normal(0, 7, 5)

    def model(self) -> nn.Module:
        return Network()

    def parts(self) -> GroupParts:
        """The hidden units of the first layer: one site, whose groups are disjoint with all that goes with them."""
        traced = trace_groups(self.model(), self.inputs)
        return GroupParts(next(iter(traced.sites().values())), self.model())

    def cut(self, parts: list[int]) -> tuple[Tensor, Tensor]:
        model, chosen = self.model(), [self.parts().groups[part] for part in parts]
        sliced, _ = check_slicing(model, chosen, self.inputs)
        return zeroed_outputs(model, chosen, self.inputs)[0], sliced(self.inputs).detach()


class TestHiddenUnits(GroupLaws):
    covers = ("layers.0.weight", "layers.0.bias", "layers.2.weight")

    def build(self) -> Partition:
        return self.parts()


class TestWhatProducesHiddenUnits(GroupLaws):
    covers = ("layers.0.weight", "layers.0.bias")

    def build(self) -> Partition:
        return self.parts().restricted("produced")


class TestWhatReadsHiddenUnits(GroupLaws):
    covers = ("layers.2.weight",)

    def build(self) -> Partition:
        return self.parts().restricted("outgoing")


class TestChannels(GroupLaws):
    inputs = normal(0, 3, 2, 8, 8)
    covers = ("0.weight", "0.bias", "2.weight")

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        return nn.Sequential(*layers).double()

    def build(self) -> Partition:
        return self.parts()


def test_groups_of_all_sites_share_no_entries_that_make_them() -> None:
    model = Network()
    groups = trace_groups(model, normal(0, 7, 5)).groups
    every = GroupParts(groups, model)
    every.restricted("produced").check()
    every.restricted("outgoing").check()
    with pytest.raises(OptionError, match="shares entries with another part"):
        every.check()  # the second layer's weight has its own units on one axis and those of the first on the other
    assert every.restricted("everything") is every
    assert [every.restricted(role).count for role in ROLES] == [10] * 3
    assert every.sites == {"hidden units of layers.0": list(range(6)), "hidden units of layers.2": list(range(6, 10))}


def test_what_is_no_partition_is_refused() -> None:
    with pytest.raises(OptionError, match="shares entries with another part"):
        ParameterSets(SHAPES, [("first", "second"), ("first",)]).check()
    with pytest.raises(OptionError, match="do not cover bias"):
        Tiles(MATRICES).check(["bias"])
    with pytest.raises(OptionError, match=r"first \(4, 12\) does not divide into tiles of 3 × 4"):
        Tiles(MATRICES, (3, 4))
    with pytest.raises(OptionError, match="no role 'read'"):
        GroupParts([], Network(), "read")
