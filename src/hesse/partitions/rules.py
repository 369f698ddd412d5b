"""Rules: the effect of each operation on units, one function per kind of operation, and the table of operations."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hesse.partitions.contractions import bmm, convolution, mm, mv, with_bias
from hesse.partitions.planes import Plane, Planes, align_plane, pin_units, squeeze_plane, tidy_planes
from hesse.partitions.propagation import Call, Propagation, PropagationRule, tensors
from hesse.partitions.units import Axis

OF_ENTRIES = ("dtype", "device", "layout", "memory_format")  # arguments that labels do not take


def elementwise(run: Propagation, call: Call) -> Sequence[Planes]:
    """Join the units of entries that are combined; a unit stays zero if the operation maps its zeros to zero."""
    (result,) = tensors(call.result)
    operands = [t for t in tensors((call.args, call.kwargs)) if t.ndim]
    reason = run.reason(f"joins them with a constant ({call.name})")
    own = [[align_plane(p, result.ndim) for p in run.planes(t)] for t in operands]
    for dim in range(result.ndim):
        sized = [i for i, t in enumerate(operands) if t.ndim >= result.ndim - dim and _size(t, result, dim) > 1]
        if any(all(dim not in p.varies() for p in own[i]) for i in sized):
            for plane in (p for planes in own for p in planes):
                pin_units(run.units, plane, {dim}, reason)
    merged = tidy_planes(run.units, [p for planes in own for p in planes], reason)
    return [tuple(Plane(p.units, _stays_zero(call, operands, own, p)) for p in merged)]


def _size(operand: Tensor, result: Tensor, dim: int) -> int:
    return operand.shape[dim - result.ndim + operand.ndim]


def _stays_zero(call: Call, operands: list[Tensor], own: list[list[Plane]], merged: Plane) -> bool:
    """True if the operation's result is zero where the operands that carry a plane are zero."""
    zero = {id(t) for t, ps in zip(operands, own, strict=True) for p in ps if p.zero and p.varies() & merged.varies()}
    return bool(zero) and gives_zero(call, zero)


def gives_zero(call: Call, zero: set[int]) -> bool:
    """True if the operation gives only zeros when the arguments with these ids are zero."""

    def blank(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if id(tensor) in zero else tensor.clone()

    args, kwargs = tree_map_only(Tensor, blank, (call.args, call.kwargs))
    given = call.function(*args, **kwargs)
    return all(not bool(t.count_nonzero()) for t in tensors(given)[:1])


def rearrange(run: Propagation, call: Call) -> Sequence[Planes]:
    """Views, permutations, slices and copies: labels move with the entries."""
    source, results = call.args[0], tensors(call.result)
    found: list[list[Plane]] = [[] for _ in results]
    others = tree_map_only(Tensor, Tensor.cpu, call.args[1:])  # labels are on the CPU
    kwargs = {key: value for key, value in call.kwargs.items() if key not in OF_ENTRIES}
    for plane in run.planes(source):
        labels = call.function(plane.units.expand(source.shape), *others, **kwargs)
        for place, piece in enumerate(tensors(labels)):
            found[place].append(Plane(piece, plane.zero))
    return [tuple(planes) for planes in found]


def copy_planes(run: Propagation, call: Call) -> Sequence[Planes]:
    """Results of the same shape have the same planes."""
    return [run.planes(call.args[0]) for _ in tensors(call.result)]


def like(run: Propagation, call: Call) -> Sequence[Planes]:
    """New entries in the shape of old ones: they belong to the same units."""
    zero = not bool(call.result.count_nonzero())
    return [tuple(Plane(p.units, zero) for p in run.planes(call.args[0]))]


def reshape_planes(run: Propagation, call: Call) -> Sequence[Planes]:
    """A view of another shape; if it splits a dimension of units, the parts must stay rectangular."""
    source, (result,) = call.args[0], tensors(call.result)
    found = [Plane(p.units.expand(source.shape).reshape(result.shape), p.zero) for p in run.planes(source)]
    planes = run.tidy(found)
    for plane in planes:
        if len(plane.varies()) > 1:
            run.rectangles.append((plane, run.reason("views them in a shape of its own")))
    return [planes]


def join_planes(run: Propagation, call: Call) -> Sequence[Planes]:
    """Concatenation: side by side along one dimension, joined along the others."""
    pieces: list[Tensor] = list(call.args[0])
    pieces = [t for t in pieces if t.numel()]
    dim = call.argument(1, call.kwargs.get("dim", 0)) % pieces[0].ndim
    reason = run.reason("joins them with a constant (cat)")
    own = [run.planes(t) for t in pieces]
    shared = {k for planes in own for p in planes if dim in p.varies() for k in p.varies()}
    along = [[p for p in planes if p.varies() & shared] for planes in own]
    found = [p for planes in own for p in planes if not p.varies() & shared]
    for k in set(range(pieces[0].ndim)) - {dim}:
        if any(all(k not in p.varies() for p in planes) for planes in own if pieces[0].shape[k] > 1):
            for plane in (p for planes in own for p in planes):
                pin_units(run.units, plane, {k}, reason)
    if any(along):
        labels = [_side(run, t, ps, dim, reason).expand(t.shape) for t, ps in zip(pieces, along, strict=True)]
        found.append(Plane(torch.cat(labels, dim), zero=True))
    zero = all(p.zero for planes in own for p in planes)
    return [tuple(Plane(p.units, zero) for p in tidy_planes(run.units, found, reason))]


def _side(run: Propagation, tensor: Tensor, planes: list[Plane], dim: int, reason: str) -> Tensor:
    """Return the labels of a piece of a concatenation: its own, or new fixed ones."""
    if planes:
        return tidy_planes(run.units, planes, reason)[0].units
    size = tensor.shape[dim]
    fixed = run.units.new(Axis("", dim, size))
    run.units.note("fixed", fixed, reason)
    return fixed.view([size if k == dim else 1 for k in range(tensor.ndim)])


def stack_tensors(run: Propagation, call: Call) -> Sequence[Planes]:
    """Tensors of one shape along a new dimension: entries at the same place are joined."""
    dim = call.argument(1, call.kwargs.get("dim", 0)) % (call.args[0][0].ndim + 1)
    planes = [Plane(p.units.unsqueeze(dim), p.zero) for tensor in call.args[0] for p in run.planes(tensor)]
    whole = tidy_planes(run.units, planes, run.reason("stacks them"))
    return [tuple(Plane(p.units, all(q.zero for q in planes)) for p in whole)]


def reduce_dims(run: Propagation, call: Call) -> Sequence[Planes]:
    """Sums, means, softmax, maxima and orders: units that are combined are fixed, or removed as a whole."""
    source, results = call.args[0], tensors(call.result)
    dims = _dims(call, source.ndim)
    planes = _taken_together(run, call, source, dims)
    zero = bool(planes) and gives_zero(call, {id(source)})
    if results[0].shape != source.shape:
        planes = [p for p in planes if not p.varies() & dims]
    left = [p if results[0].ndim == source.ndim else squeeze_plane(p, sorted(dims)) for p in planes]
    return [tuple(Plane(p.units, zero and p.zero) for p in left)] * len(results)


def _taken_together(run: Propagation, call: Call, source: Tensor, dims: set[int]) -> list[Plane]:
    planes = run.planes(source)
    for plane in planes:
        if not (call.name == "sum" and plane.zero and plane.varies() <= dims):
            pin_units(run.units, plane, dims, run.reason(f"takes them together ({call.name})"))
    return list(run.tidy(planes))


def _dims(call: Call, ndim: int) -> set[int]:
    given = call.argument(1, call.kwargs.get("dim"))
    if call.name in ("topk", "norm", "linalg_vector_norm"):
        given = call.argument(2, -1 if call.name == "topk" else None)
    if given is None or (isinstance(given, list) and not given):
        return set(range(ndim))
    return {dim % ndim for dim in (given if isinstance(given, list | tuple) else [given])}


def layer_norm(run: Propagation, call: Call) -> Sequence[Planes]:
    """Layer norm: statistics over the last dimensions, then weight and offset."""
    source, shape, weight = call.args[:3]
    bias = call.args[3] if call.name == "native_layer_norm" else None
    dims = set(range(source.ndim - len(shape), source.ndim))
    planes = _taken_together(run, call, source, dims)
    affine = [align_plane(p, source.ndim) for t in (weight, bias) for p in run.planes(t)]
    whole = run.tidy([*planes, *affine])
    first = tuple(Plane(p.units, bias is None and all(q.zero for q in planes)) for p in whole)
    return [first, *[()] * (len(tensors(call.result)) - 1)]


def group_norm(run: Propagation, call: Call) -> Sequence[Planes]:
    """Group norm: the channels of a group are joined, with their weight and offset."""
    source, weight, bias, groups = call.args[0], call.args[1], call.args[2], call.args[6]
    planes = [*run.planes(source), *(_channels(p, source.ndim) for t in (weight, bias) for p in run.planes(t))]
    for plane in planes:
        if plane.varies() != {1}:
            pin_units(run.units, plane, plane.varies() - {1}, run.reason("takes them together (group norm)"))
            continue
        rows = plane.units.reshape(groups, -1)
        run.units.join(rows, rows[:, :1])
    whole = tidy_planes(run.units, planes, run.reason("takes them together (group norm)"))
    return [tuple(Plane(p.units, weight is not None and bias is not None) for p in whole), (), ()]


def batch_norm(run: Propagation, call: Call) -> Sequence[Planes]:
    """Batch norm: a channel is joined with its weight, offset and running statistics."""
    source, weight, bias, *statistics = call.args[:5]
    affine = [_channels(p, source.ndim) for t in (weight, bias, *statistics) for p in run.planes(t)]
    whole = run.tidy([*run.planes(source), *affine])
    zero = weight is not None and bias is not None
    first = tuple(Plane(p.units, zero) for p in whole)
    return [first, *[()] * (len(tensors(call.result)) - 1)]


def _channels(plane: Plane, ndim: int) -> Plane:
    return Plane(plane.units.view(1, -1, *[1] * (ndim - 2)), plane.zero)


def pool(run: Propagation, call: Call) -> Sequence[Planes]:
    """Pooling and interpolation over positions: channels are not mixed."""
    source = call.args[0]
    return _spread(run, call, set(range(2, source.ndim)))


def pad_positions(run: Propagation, call: Call) -> Sequence[Planes]:
    """Padding adds positions; padded dimensions must have no units."""
    source = call.args[0]
    return _spread(run, call, {d for d in range(source.ndim) if source.shape[d] != call.result.shape[d]})


def _spread(run: Propagation, call: Call, dims: set[int]) -> Sequence[Planes]:
    source, results, reason = call.args[0], tensors(call.result), run.reason(f"mixes positions ({call.name})")
    left = [plane for plane in run.planes(source) if not pin_units(run.units, plane, dims, reason)]
    zero = gives_zero(call, {id(source)})
    return [tuple(Plane(p.units, zero and p.zero) for p in tidy_planes(run.units, left, reason))] * len(results)


def written(run: Propagation, call: Call) -> Sequence[Planes]:
    """Copy of the second argument into the first."""
    target, source = call.args[:2]
    return [tuple(align_plane(p, target.ndim) for p in run.planes(source))]


def embedding(run: Propagation, call: Call) -> Sequence[Planes]:
    """Embedding: rows are looked up by number, so they are fixed; columns are produced here."""
    found = []
    (result,) = tensors(call.result)
    for plane in run.planes(call.args[0]):
        if not pin_units(run.units, plane, {0}, run.reason("looks them up by number")):
            run.units.note("written", plane.units)
            found.append(Plane(plane.units.view(*[1] * (result.ndim - 1), -1), zero=True))
    return [tuple(found)]


def select_entries(run: Propagation, call: Call) -> Sequence[Planes]:
    """Indexing: a slice if the indices are constant; otherwise the indexed dimension is fixed."""
    source = call.args[0]
    picks = call.args[1] if call.name == "index" else [None] * (call.args[1] % source.ndim) + [call.args[2]]
    if not any(run.is_data(pick) for pick in picks):
        return rearrange(run, call)
    dims, found = {dim for dim, pick in enumerate(picks) if pick is not None}, []
    for plane in run.planes(source):
        if not pin_units(run.units, plane, dims, run.reason("picks them by number")):
            labels = call.function(plane.units.expand(source.shape), *tree_map_only(Tensor, Tensor.cpu, call.args[1:]))
            found.append(Plane(labels, plane.zero))
    return [tuple(found)]


def nothing(run: Propagation, call: Call) -> Sequence[Planes]:
    """Results without units."""
    return [()] * len(tensors(call.result))


def _table(*entries: tuple[PropagationRule, str]) -> dict[str, PropagationRule]:
    return {name: rule for rule, names in entries for name in names.split()}


RULES: dict[str, PropagationRule] = _table(
    (
        rearrange,
        "t transpose permute expand unsqueeze squeeze slice select split split_with_sizes unbind unfold diagonal",
    ),
    (rearrange, "repeat roll flip narrow chunk movedim swapaxes as_strided tril triu"),
    (copy_planes, "clone detach alias _to_copy contiguous lift_fresh lift_fresh_copy dropout native_dropout"),
    (like, "zeros_like ones_like full_like empty_like rand_like randn_like"),
    (reshape_planes, "view _unsafe_view reshape _reshape_alias flatten unflatten"),
    (join_planes, "cat"),
    (stack_tensors, "stack"),
    (elementwise, "masked_fill where clamp"),
    (written, "copy"),
    (
        reduce_dims,
        "sum mean amax amin max min var std softmax _softmax _safe_softmax log_softmax _log_softmax logsumexp",
    ),
    (reduce_dims, "cumsum cumprod argmax argmin topk sort argsort norm linalg_vector_norm prod any all"),
    (layer_norm, "native_layer_norm _fused_rms_norm"),
    (group_norm, "native_group_norm"),
    (batch_norm, "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm"),
    (pool, "max_pool2d_with_indices max_pool1d max_pool2d avg_pool1d avg_pool2d avg_pool3d"),
    (pad_positions, "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    (pool, "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d max_pool3d_with_indices"),
    (pool, "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d mkldnn_max_pool2d"),
    (embedding, "embedding"),
    (select_entries, "index index_select gather"),
    (mm, "mm"),
    (mv, "mv dot"),
    (bmm, "bmm"),
    (with_bias(mm, elementwise), "addmm"),
    (with_bias(bmm, elementwise), "baddbmm"),
    (convolution, "convolution"),
    (
        nothing,
        "sym_size sym_stride sym_numel sym_storage_offset _assert_async new_zeros new_ones new_empty new_full",
    ),
)
