"""Batch sizes of passes."""

from hesse.networks.network import Network
from hesse.networks.vocabulary import vocabulary

LOGITS_LIMIT = 1 << 25


def evaluation_batch(network: Network, length: int) -> int:
    """Return the number of samples of `length` tokens whose logits stay within `LOGITS_LIMIT`."""
    return max(LOGITS_LIMIT // (vocabulary(network) * length), 1)
