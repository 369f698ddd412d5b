"""How many samples pass through a network together."""

from hesse.networks.network import Network
from hesse.networks.vocabulary import vocabulary

LOGITS_LIMIT = 1 << 25


def evaluation_batch(network: Network, length: int) -> int:
    """Samples of `length` tokens a batch such that their logits stay within `LOGITS_LIMIT`."""
    return max(LOGITS_LIMIT // (vocabulary(network) * length), 1)
