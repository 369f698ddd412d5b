"""Which weights live and go together: groups of a network's parameters, and networks without some of them."""

from hesse.partitions.checking import check_partition, check_slicing, zero_groups, zeroed_outputs
from hesse.partitions.loading import loading_problem
from hesse.partitions.partition import KINDS, Group, Partition, Slice
from hesse.partitions.slicing import slice_groups
from hesse.partitions.tracing import Forward, call_with, trace_groups

__all__ = [
    "KINDS",
    "Forward",
    "Group",
    "Partition",
    "Slice",
    "call_with",
    "check_partition",
    "check_slicing",
    "loading_problem",
    "slice_groups",
    "trace_groups",
    "zero_groups",
    "zeroed_outputs",
]
