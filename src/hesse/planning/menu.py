"""Menu of a budget: the rules on offer for each group of layers, with their stored constraints and bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hesse.constraints import Constraint, Grid, SparseGrid
from hesse.errors import HesseError, OptionError
from hesse.formats import StoredLayer, choose_format
from hesse.formats.packed import PackedFormat
from hesse.formats.targets import fused_groups, refusal
from hesse.methods import Method, Options, find_method
from hesse.methods.patterns import matches
from hesse.methods.recipe import Rule
from hesse.networks.network import CheckpointNetwork, Layer

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
RANKS = (1 / 8, 1 / 4)  # shares of a group's shortest side; larger factors take about the bytes of 8 bits
SPARSITIES: tuple[float | str, ...] = (0.5, "2:4")


@dataclass(frozen=True, eq=False)
class Offer:
    """A rule on offer for a group of layers."""

    label: str
    rule: Rule | None  # None: unchanged
    constraints: dict[str, Constraint | None]  # by layer, as stored
    size: int  # bytes of the group's layers


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers that need one scheme, and the offers for them."""

    name: str
    layers: tuple[Layer, ...]
    offers: tuple[Offer, ...]

    @property
    def needs_output_factor(self) -> bool:
        """True if a rule on offer needs the whole output factor E[ggᵀ], not only its diagonal."""
        return any(offer.rule is not None and "output factor" in offer.rule.kind.needs for offer in self.offers)


def make_menu(
    network: CheckpointNetwork, method: Method, options: Options, ignore: tuple[str, ...], target: str, format: str
) -> list[LayerGroup]:
    """Return the groups of layers that are not ignored, each with all offers of `method` and `target`.

    Given `options` hold for every offer. An offer is left out if its set of weights is contained in the set of another
    offer that takes no more bytes, because it cannot cost less: a pruned layer is stored dense, or as its grid's codes.

    Raises:
        OptionError: no change is on offer for any layer; the message says why.
    """
    if options.bits is not None:
        raise OptionError("a budget chooses the bits: leave out --bits, or give whole bits and no budget")
    layers = [layer for layer in network.layers if not any(matches(layer.name, pattern) for pattern in ignore)]
    if not layers:
        raise OptionError("no layer is left to compress: leave out an --ignore")
    groups = fused_groups(layers, one_scheme=_one_scheme(network, layers))
    menu, refused, offered = [], list[str](), False
    for name, members in groups.items():
        offers = []
        for label, rule in _rules(method, options, members):
            try:
                offers.append(_offer(network, members, label, rule, target, format))
            except HesseError as error:
                refused.append(str(error))
        if not offers:
            raise OptionError(f"nothing is on offer: {refused[-1]}")
        offered |= any(offer.rule for offer in offers)
        menu.append(LayerGroup(name, tuple(members), tuple(_useful(offers))))
    if not any(offer.rule for group in menu for offer in group.offers):
        reason = refused[0] if not offered else f"--format {format} stores each layer in as many bytes as it has now"
        raise OptionError(f"no budget can be shared out: {reason}")
    return menu


def _one_scheme(network: CheckpointNetwork, layers: list[Layer]) -> bool:
    """True if loaders read packed layers of this network only if all share one scheme."""
    stored = [StoredLayer(layer.name, layer.weight.shape, Grid(8, -1), layer.transposed) for layer in layers]
    return PackedFormat(network, stored).unpacks_while_loading


def _rules(method: Method, options: Options, layers: list[Layer]) -> Iterator[tuple[str, Rule | None]]:
    """Yield all candidate rules of a group with labels; given options exclude rules without them."""
    has = {*method.constraints, *method.optional}
    own = replace(options, damping=None, act_order=None) != Options()
    side = min(min(layer.weight.shape) for layer in layers)
    ranks = sorted({max(int(side * share), 1) for share in RANKS})
    if "grid" in has:
        sizes = GROUP_SIZES if options.group_size is None else (options.group_size,)
        for chosen in (replace(options, bits=bits, group_size=size) for bits in BITS for size in sizes):
            yield _label(chosen), method.recipe(chosen).rules[0]
    if "low_rank" in has:
        for rank in ranks if options.rank is None else [options.rank]:
            yield f"rank {rank}", method.recipe(replace(options, rank=rank)).rules[0]
    elif not own:
        for amount in SPARSITIES:
            yield f"{amount} sparse", find_method("sparsegpt").recipe(Options(sparsity=amount)).rules[0]
        for rank in ranks:
            yield f"rank {rank}", find_method("activation-svd").recipe(Options(rank=rank)).rules[0]
    if options.sparsity is None and options.rank is None:
        yield "left alone", None


def _label(options: Options) -> str:
    group = "whole rows" if options.group_size == -1 else f"groups of {options.group_size}"
    sparse = "" if options.sparsity is None else f"{options.sparsity} sparse, "
    return f"{sparse}{options.bits} bits, {group}"


def _offer(
    network: CheckpointNetwork, layers: list[Layer], label: str, rule: Rule | None, target: str, format: str
) -> Offer:
    """Return the offer of a rule, with its constraints as stored.

    Raises:
        HesseError: no format stores the rule, or the target does not support it.
    """
    if rule is None:
        size = sum(network.tensors.dtype(f"{x.name}.weight").itemsize * x.weight.numel() for x in layers)
        return Offer(label, None, {layer.name: None for layer in layers}, size)
    stored = [StoredLayer(x.name, x.weight.shape, rule.constraint.build(), x.transposed) for x in layers]
    for layer in stored:
        assert layer.constraint is not None
        layer.constraint.check(layer.shape)
        reason = refusal(target, layer.constraint, layer.shape, layer.transposed)
        if reason is not None:
            raise OptionError(f"{layer.name}: {target} does not support {label}: {reason}")
    kind = choose_format(format, network, stored)
    size = sum(round(kind.stored_bits(x.name) * x.shape.numel() / 8) for x in stored)
    return Offer(label, rule, {layer.name: kind.constraint(layer.name) for layer in layers}, size)


def _useful(offers: list[Offer]) -> list[Offer]:
    """Return the offers that are not contained in another of no more bytes; of equal offers, the first."""

    def beaten(offer: Offer, other: Offer) -> bool:
        same = _within(other, offer) and other.size == offer.size
        return other.size <= offer.size and _within(offer, other) and not same

    kept: list[Offer] = []
    for offer in offers:
        same = any(_within(offer, other) and _within(other, offer) for other in kept)
        if not same and not any(beaten(offer, other) for other in offers if other is not offer):
            kept.append(offer)
    return kept


def _within(inner: Offer, outer: Offer) -> bool:
    """True if `outer` allows every weight that `inner` allows."""
    pairs = [(constraint, outer.constraints[name]) for name, constraint in inner.constraints.items()]
    return all(
        wide is None or narrow == wide or (isinstance(narrow, SparseGrid) and narrow.grid == wide)
        for narrow, wide in pairs
    )
