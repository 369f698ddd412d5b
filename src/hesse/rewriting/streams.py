"""Streams: features that pass between layers unchanged, in the families that Hesse rewrites."""

from dataclasses import dataclass
from functools import partial

from hesse.errors import UnsupportedModelError
from hesse.networks.families import FAMILIES, FeatureStreams, family_of
from hesse.networks.network import CheckpointNetwork

HEAD = "lm_head.weight"
# Tensors of a block that write the residual stream.
WRITERS = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")


@dataclass(frozen=True)
class Stream:
    """Features that some tensors of the checkpoint write and others read, so that both can absorb a map of them."""

    name: str
    writers: tuple[str, ...]  # weights (features, in), and biases and the scales of norms (features,)
    readers: tuple[str, ...]  # weights (out, features), or with each head repeated (out, features · repeats)
    heads: int = 1  # number of equal parts that a map must not mix
    repeats: int = 1  # times that readers receive each head in a row
    offset: float = 0.0  # added by the model to the stored writers: 1 for norms that scale by 1 + w

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the readers' names without `.weight`."""
        return tuple(name.removesuffix(".weight") for name in self.readers)


@dataclass(frozen=True)
class BlockStreams:
    """Streams inside one block."""

    attention: Stream  # from a norm to queries, keys and values: any diagonal map
    feedforward: Stream  # from a norm to gate and up: any diagonal map
    values: Stream  # from values to the attention's output, by heads: any map within a head
    inner: Stream  # from up to down, through a product of features: any diagonal map

    @property
    def all(self) -> tuple[Stream, ...]:
        """Return the streams in forward order."""
        return self.attention, self.values, self.feedforward, self.inner


@dataclass(frozen=True)
class Streams:
    """All streams of a network."""

    residual: Stream | None  # the residual stream: any orthogonal map after folding norms; None if norms forbid it
    final: Stream  # from the last norm to the head
    blocks: tuple[BlockStreams, ...]

    @property
    def all(self) -> list[Stream]:
        """Return all streams."""
        outside = [self.final] if self.residual is None else [self.residual, self.final]
        return [*outside, *(stream for block in self.blocks for stream in block.all)]

    @property
    def norms(self) -> list[Stream]:
        """Return the streams that a norm writes."""
        return [stream for block in self.blocks for stream in (block.attention, block.feedforward)] + [self.final]


def find_streams(network: CheckpointNetwork, rotated: bool) -> Streams:
    """Find the streams of `network`, for rotations if `rotated`, else for scales.

    Raises:
        UnsupportedModelError: the family is not supported, or has norms that do not commute with rotations.
    """
    config = network.model.config
    family = family_of(config.model_type).streams
    if family is None or network.kind != "causal-lm":
        known = [name for name, one in FAMILIES.items() if one.streams and (one.streams.rotates or not rotated)]
        raise UnsupportedModelError(
            f"{type(network.model).__name__} is of a family that Hesse does not rewrite: it knows {', '.join(known)}"
        )
    if rotated and not family.rotates:
        raise UnsupportedModelError(
            f"{type(network.model).__name__} has norms with scales after its layers, which forbid rotations: use a "
            "method that does not rotate"
        )
    blocks = tuple(_block_streams(network, block.name, family) for block in network.blocks)
    base = f"{network.model.base_model_prefix}."
    embeddings = network.sources[f"{base}embed_tokens.weight"]
    head = network.sources[HEAD]
    head = HEAD if head == embeddings else head
    final = Stream("norm", (network.sources[f"{base}norm.weight"],), (head,), offset=family.norm_offset)
    residual = None
    if family.rotates:
        written = [name for block in network.blocks for name in _stored(network, block.name, *WRITERS)]
        # The columns of the embeddings are the features, so they become E Rᵀ, as readers do.
        read = [name for block in blocks for stream in (block.attention, block.feedforward) for name in stream.readers]
        residual = Stream("residual", tuple(written), (embeddings, *read, head))
    return Streams(residual, final, blocks)


def _block_streams(network: CheckpointNetwork, block: str, family: FeatureStreams) -> BlockStreams:
    stored = partial(_stored, network, block)
    queries = stored("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    gates = stored("mlp.gate_proj.weight", "mlp.up_proj.weight")
    heads = int(network.model.config.num_key_value_heads)
    repeats = int(network.model.config.num_attention_heads) // heads
    offset = family.norm_offset
    return BlockStreams(
        Stream(f"{block}.attention", stored("input_layernorm.weight"), queries, offset=offset),
        Stream(f"{block}.feedforward", stored(f"{family.feedforward_norm}.weight"), gates, offset=offset),
        Stream(
            f"{block}.values",
            stored("self_attn.v_proj.weight", "self_attn.v_proj.bias"),
            stored("self_attn.o_proj.weight"),
            heads,
            repeats,
        ),
        Stream(f"{block}.inner", stored("mlp.up_proj.weight", "mlp.up_proj.bias"), stored("mlp.down_proj.weight")),
    )


def _stored(network: CheckpointNetwork, block: str, *children: str) -> tuple[str, ...]:
    """Return the checkpoint's names of a block's tensors `children`, those that exist."""
    names = (f"{block}.{child}" for child in children)
    return tuple(network.sources[name] for name in names if name in network.sources)
