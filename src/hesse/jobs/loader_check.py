"""Check what was written by the program it is for: transformers loads it, block by block, and does the same."""

import transformers
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import VerificationError, reason
from hesse.formats.loaded_network import LoadedNetwork, needs_code, open_loaded, quiet
from hesse.networks.network import CheckpointNetwork
from hesse.passes.stream import StreamBatch, advance, start

CHECKED_TOKENS = 64
TOLERANCE = 1e-3  # of the standard deviation of the hidden states


def check_loads(result: CheckpointNetwork, source: Checkpoint, ids: Tensor) -> str | None:
    """Check that transformers makes of a folder what Hesse reads from it.

    transformers' own class, quantizer and conversions load the folder one block at a time; no tensor may be missing,
    unexpected or of another shape, and after each block the hidden states of one sample must be those of `result`.

    Args:
        result: the folder as Hesse reads it, in float32.
        source: the model that it was made from; what transformers misses there may be missing here too.
        ids: one sample's token ids (1, tokens); the first of them are run.

    Returns:
        None, or the reason why transformers was not asked.

    Raises:
        VerificationError: transformers cannot load the folder, or makes something else of it; the message names the
            tensor or the block.
    """
    written = Checkpoint(result.checkpoint.folder)
    if needs_code(written.config):
        return "it comes with code of its own, which is never run here"
    loaded = open_loaded(written, source, result.device)
    if isinstance(loaded, str):
        raise _refusal(loaded)
    with quiet():
        _check(loaded, result, ids[:1, :CHECKED_TOKENS])
    return None


def _check(loaded: LoadedNetwork, result: CheckpointNetwork, ids: Tensor) -> None:
    try:
        flows = start(result, [ids]), start(loaded, [ids])
    except Exception as error:  # transformers raises many kinds
        raise _refusal(f"transformers {transformers.__version__} cannot load it: {reason(error)}") from error
    _compare("the embeddings", flows[0], flows[1])
    for index, (block, twin) in enumerate(zip(result.blocks, loaded.blocks, strict=True)):
        for network, each, batch in ((result, block, flows[0]), (loaded, twin, flows[1])):
            with network.loaded(each) as module:
                advance(batch, module, index)
        _compare(block.name, *flows)


def _compare(place: str, ours: list[StreamBatch], theirs: list[StreamBatch]) -> None:
    expected, found = ours[0].hidden, theirs[0].hidden
    difference = float((expected - found).abs().max())
    if not difference <= TOLERANCE * float(expected.std()):
        raise _refusal(
            f"the hidden states after {place} are others in transformers {transformers.__version__}: they differ by "
            f"{difference:.3g}, at a standard deviation of {float(expected.std()):.3g}"
        )


def _refusal(what: str) -> VerificationError:
    return VerificationError(f"{what}: nothing was put in place; use --format dense, and report it")
