"""Rewriting of one model: find its changes, from data if necessary, and present the changed checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.tensor_store import TensorStore
from hesse.checkpoints.writer import write_tensors
from hesse.networks.network import CheckpointNetwork
from hesse.passes.stream import start
from hesse.rewriting.checkpoint import RewrittenCheckpoint, StreamChange
from hesse.rewriting.maps import FeatureMap, Folding, Rotation, Scaling
from hesse.rewriting.rotation import draw_rotations, fold_norms, learn_rotations
from hesse.rewriting.scales import SCALINGS, RoundingTarget, search_scales
from hesse.rewriting.streams import HEAD, Stream, find_streams

ROTATIONS = ("hadamard", "kurtail")
OF_ROTATION = 10  # float64 matrices of a rotation's size that are in memory while it is learned
MAPS: dict[str, type[FeatureMap]] = {kind.__name__: kind for kind in (Folding, Rotation, Scaling)}


@dataclass(frozen=True, eq=False)
class RewritingSamples:
    """Samples and settings of a rewriting that is learned from data."""

    batches: list[Tensor]  # of token ids (samples, tokens)
    targets: Mapping[str, RoundingTarget]  # the later rounding of each layer, for scales
    seed: int
    folder: Path | None  # where hidden states are stored; None: in memory
    step: Callable[[], None]  # called after each block


class Rewriting:
    """Rewriting of kind `kind` for a network; `checkpoint` presents the result after `find` or `load`.

    The names, shapes, types and config of `checkpoint` are final from the start.

    Raises:
        UnsupportedModelError: this kind of rewriting is not possible for the model's family.
    """

    def __init__(self, kind: str, network: CheckpointNetwork) -> None:
        self.kind, self.network = kind, network
        rotates = kind in ROTATIONS
        self.streams = find_streams(network, rotates)
        self.base = network.checkpoint
        self.checkpoint = RewrittenCheckpoint(self.base, head=network.sources[HEAD] if rotates else None)

    @property
    def learns(self) -> bool:
        """True if the rewriting is learned from data."""
        return self.kind != "hadamard"

    @property
    def working_bytes(self) -> int:
        """Return an upper bound, in bytes, of the workspace for reading the rewritten model."""
        rotated = [stream for stream in self.streams.all if stream is self.streams.residual or stream.heads > 1]
        widths = [(self.checkpoint.shape(stream.writers[0])[0], stream.heads) for stream in rotated]
        largest = max(self.checkpoint.shape(name).numel() for name in self.checkpoint.names())
        maps = 8 * sum(width**2 // heads for width, heads in widths)
        learning = OF_ROTATION * 8 * max(width**2 for width, _ in widths) if self.kind == "kurtail" else 0
        return maps + learning + 16 * largest

    def find(self, samples: RewritingSamples) -> None:
        """Find the changes, and apply them to `checkpoint`.

        Raises:
            DataError: the model overflows on the samples.
        """
        if self.kind in SCALINGS:
            flows = start(self.network, samples.batches, TensorStore(samples.folder, "rewrite"))
            parts = (self.network, self.streams, flows, samples.targets, samples.step)
            self.checkpoint.change(search_scales(self.kind, *parts))
            return
        folds = fold_norms(self.base, self.streams)
        self.checkpoint.change(folds)
        if self.kind == "hadamard":
            rotations = draw_rotations(self.base, self.streams, samples.seed)
        else:
            network = CheckpointNetwork(self.checkpoint, torch.float32, self.network.device)
            flows = start(network, samples.batches, TensorStore(samples.folder, "rewrite"))
            rotations = learn_rotations(network, self.streams, flows, samples.seed, samples.step)
        self.checkpoint.change([*folds, *rotations])

    def save(self, path: Path) -> None:
        """Write the changes to a safetensors file."""
        changes = self.checkpoint.changes
        write_tensors(
            path, {f"{i} {type(c.map).__name__} {c.stream.name}": c.map.values for i, c in enumerate(changes)}
        )

    def load(self, path: Path) -> None:
        """Read the changes that `save` wrote, and apply them to `checkpoint`."""
        streams: dict[str, Stream] = {stream.name: stream for stream in self.streams.all}
        changes: dict[int, StreamChange] = {}
        for name, values in load_file(path).items():
            number, kind, stream = name.split(" ", 2)
            changes[int(number)] = StreamChange(streams[stream], MAPS[kind](values))
        self.checkpoint.change([changes[number] for number in sorted(changes)])
