"""Partitions: sets of weights that are kept or removed together, and networks with parts removed."""

from hesse.partitions.group_parts import GroupParts
from hesse.partitions.groups import GROUP_KINDS, Group, Slice, TracedGroups
from hesse.partitions.parameter_sets import ParameterSets
from hesse.partitions.partition import Partition
from hesse.partitions.sizes import loading_problem
from hesse.partitions.slicing import check_groups, check_slicing, slice_groups, zero_groups, zeroed_outputs
from hesse.partitions.tiles import Tiles
from hesse.partitions.tracing import Forward, call_with, trace_groups

__all__ = [
    "GROUP_KINDS",
    "Forward",
    "Group",
    "GroupParts",
    "ParameterSets",
    "Partition",
    "Slice",
    "Tiles",
    "TracedGroups",
    "call_with",
    "check_groups",
    "check_slicing",
    "loading_problem",
    "slice_groups",
    "trace_groups",
    "zero_groups",
    "zeroed_outputs",
]
