"""A rewriting of one model: what may be changed, found from data where it is, and the checkpoint that comes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.tensor_store import TensorStore
from hesse.checkpoints.writer import write_tensors
from hesse.networks.network import Network
from hesse.passes.stream import start
from hesse.rewriting.checkpoint import Change, RewrittenCheckpoint
from hesse.rewriting.maps import Folding, Map, Rotation, Scaling
from hesse.rewriting.rotation import draw_rotations, fold_norms, learn_rotations
from hesse.rewriting.scales import SCALINGS, Target, search_scales
from hesse.rewriting.streams import HEAD, Stream, find_streams

ROTATIONS = ("hadamard", "kurtail")
OF_ROTATION = 10  # matrices of a rotation's size in float64 at once while it is learned
MAPS: dict[str, type[Map]] = {kind.__name__: kind for kind in (Folding, Rotation, Scaling)}


@dataclass(frozen=True, eq=False)
class RewritingSamples:
    """What a rewriting that is learned looks at."""

    batches: list[Tensor]  # of token ids (samples, tokens)
    targets: Mapping[str, Target]  # what each layer will be rounded to, for scales
    seed: int
    folder: Path | None  # where hidden states wait, or None for memory
    step: Callable[[], None]  # after each block


class Rewriting:
    """The rewriting `kind` of the model that `network` is of; `checkpoint` shows the result once it is found.

    Names, shapes, types and config of that are right from the start.

    Raises:
        UnsupportedModelError: the model's family cannot be rewritten so.
    """

    def __init__(self, kind: str, network: Network) -> None:
        self.kind, self.network = kind, network
        rotates = kind in ROTATIONS
        self.streams = find_streams(network, rotates)
        self.base = network.checkpoint
        self.checkpoint = RewrittenCheckpoint(self.base, head=network.sources[HEAD] if rotates else None)

    @property
    def learns(self) -> bool:
        """Whether it looks at data."""
        return self.kind != "hadamard"

    @property
    def working_bytes(self) -> int:
        """Memory that reading the rewritten model takes at most, besides what is read."""
        turned = [stream for stream in self.streams.all if stream is self.streams.residual or stream.heads > 1]
        widths = [(self.checkpoint.shape(stream.writers[0])[0], stream.heads) for stream in turned]
        largest = max(self.checkpoint.shape(name).numel() for name in self.checkpoint.names())
        maps = 8 * sum(width**2 // heads for width, heads in widths)
        learning = OF_ROTATION * 8 * max(width**2 for width, _ in widths) if self.kind == "kurtail" else 0
        return maps + learning + 16 * largest

    def find(self, sight: RewritingSamples) -> None:
        """Find what is to be changed, and show the model so changed.

        Raises:
            DataError: the model overflows on the samples.
        """
        if self.kind in SCALINGS:
            flows = start(self.network, sight.batches, TensorStore(sight.folder, "rewrite"))
            parts = (self.network, self.streams, flows, sight.targets, sight.step)
            self.checkpoint.change(search_scales(self.kind, *parts))
            return
        folds = fold_norms(self.base, self.streams)
        self.checkpoint.change(folds)
        if self.kind == "hadamard":
            found = draw_rotations(self.base, self.streams, sight.seed)
        else:
            network = Network(self.checkpoint, torch.float32, self.network.device)
            flows = start(network, sight.batches, TensorStore(sight.folder, "rewrite"))
            found = learn_rotations(network, self.streams, flows, sight.seed, sight.step)
        self.checkpoint.change([*folds, *found])

    def save(self, path: Path) -> None:
        """Write what was found to a safetensors file."""
        changes = self.checkpoint.changes
        tensors = {f"{i} {type(c.map).__name__} {c.stream.name}": c.map.values for i, c in enumerate(changes)}
        write_tensors(path, tensors)

    def load(self, path: Path) -> None:
        """Show the model with the changes that `save` wrote."""
        streams: dict[str, Stream] = {stream.name: stream for stream in self.streams.all}
        changes: dict[int, Change] = {}
        for name, values in load_file(path).items():
            number, kind, stream = name.split(" ", 2)
            changes[int(number)] = Change(streams[stream], MAPS[kind](values))
        self.checkpoint.change([changes[number] for number in sorted(changes)])
