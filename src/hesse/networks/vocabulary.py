"""The token ids that a network knows."""

from torch import Tensor

from hesse.errors import DataError
from hesse.networks.network import Network


def vocabulary(network: Network) -> int:
    """The number of token ids the network knows."""
    weight = network.model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def check_ids(network: Network, batches: list[Tensor]) -> None:
    """Raise DataError for a token id that the network does not know."""
    largest = max(int(ids.max()) for ids in batches)
    if largest >= vocabulary(network):
        raise DataError(
            f"the data holds the token id {largest}, but the model knows {vocabulary(network)}: "
            "the tokens were made by another tokenizer"
        )
