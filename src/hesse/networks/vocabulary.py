"""Vocabulary of a network."""

from torch import Tensor

from hesse.errors import DataError
from hesse.networks.network import Network


def vocabulary(network: Network) -> int:
    """Return the size of the network's vocabulary."""
    return len(network.model.get_input_embeddings().get_parameter("weight"))


def check_ids(network: Network, batches: list[Tensor]) -> None:
    """Raise DataError for a token id outside the network's vocabulary."""
    largest = max(int(ids.max()) for ids in batches)
    if largest >= vocabulary(network):
        raise DataError(
            f"the data holds the token id {largest}, but the model knows {vocabulary(network)}: "
            "the tokens come from another tokenizer"
        )
