"""Laws that every partition obeys."""

from abc import abstractmethod

import pytest
import torch
from torch import Tensor

from hesse.partitions import Partition
from hesse.testing.numbers import normal


class PartitionLaws:
    """Laws of a partition: its parts are disjoint, they sum to the whole, and zeroing them equals slicing them.

    A subclass supplies `build`, the names of the parameters that the parts cover whole in `covers`, and `cut` where
    parts can be sliced away; it inherits tests of sums, masks and spread numbers against the entries of each part.

        class TestRows(PartitionLaws):
            covers = ("weight",)
            def build(self): return Tiles({"weight": torch.Size((4, 6))}, (1, None))
    """

    covers: tuple[str, ...] = ()

    @abstractmethod
    def build(self) -> Partition:
        """The partition."""

    def cut(self, parts: list[int]) -> tuple[Tensor, Tensor] | None:
        """The outputs of a network with some parts at zero, and of one without them; None if they cannot be cut out."""
        return None

    def _tensors(self, seed: int) -> dict[str, Tensor]:
        return {name: normal(seed, *shape) for name, shape in self.build().shapes.items()}

    def test_no_entry_is_in_two_parts_and_what_is_covered_is_in_one(self) -> None:
        partition = self.build()
        assert partition.count > 1
        partition.check(self.covers)

    def test_sums_are_over_the_entries_of_each_part(self) -> None:
        partition, tensors = self.build(), self._tensors(0)
        sums, sizes = partition.sums(tensors), partition.sizes()
        for part in range(partition.count):
            masks = partition.masks([part])
            entries = torch.cat([tensors[name][mask] for name, mask in masks.items()])
            torch.testing.assert_close(sums[part], entries.sum().to(sums))
            assert int(sizes[part]) == len(entries) > 0

    def test_parts_sum_to_the_whole(self) -> None:
        partition, tensors = self.build(), self._tensors(1)
        masks = partition.masks(range(partition.count))
        for name in self.covers:
            assert bool(masks[name].all())
        whole = sum(float(tensors[name][mask].sum()) for name, mask in masks.items())
        assert float(partition.sums(tensors).sum()) == pytest.approx(whole, rel=1e-9, abs=1e-9)

    def test_each_sample_has_its_own_sums(self) -> None:
        partition = self.build()
        one, two = self._tensors(2), self._tensors(3)
        both = partition.sums_of_samples({name: torch.stack([one[name], two[name]]) for name in one})
        torch.testing.assert_close(both, torch.stack([partition.sums(one), partition.sums(two)]))
        name = next(iter(one))
        some = partition.sums({name: one[name]})  # of one parameter alone
        rest = partition.sums({key: tensor for key, tensor in one.items() if key != name}) if len(one) > 1 else 0 * some
        torch.testing.assert_close(some + rest, partition.sums(one))

    def test_numbers_are_spread_over_the_entries_of_their_part_alone(self) -> None:
        partition, tensors = self.build(), self._tensors(4)
        values = normal(5, partition.count)
        spread = partition.spread(values, tensors, 7.0)
        for part in range(partition.count):
            for name, mask in partition.masks([part]).items():
                assert bool((spread[name][mask] == values[part]).all())
        for name, mask in partition.masks(range(partition.count)).items():
            assert bool((spread[name][~mask] == 7.0).all())

    def test_zeroing_equals_slicing(self) -> None:
        outputs = self.cut([0, self.build().count - 1])
        if outputs is None:
            pytest.skip("its parts are not cut out")
        zeroed, sliced = outputs
        torch.testing.assert_close(sliced, zeroed)
