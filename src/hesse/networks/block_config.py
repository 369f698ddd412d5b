"""Config and tensor names of a model with fewer blocks, as transformers loads it."""

from collections.abc import Sequence
from typing import Any

from hesse.errors import UnsupportedModelError
from hesse.networks.families import BLOCK_LISTS, BLOCK_RULES
from hesse.networks.network import CheckpointNetwork


def fewer_blocks_config(network: CheckpointNetwork, kept: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of the model with only the blocks `kept`, in order.

    A list with one entry per block keeps the entries of the kept blocks. That includes lists that transformers computes
    when it loads the model, such as `layer_types`, because it would compute other values for fewer blocks.

    Raises:
        UnsupportedModelError: the config nests a text model's config, or the kinds of blocks depend on their numbers.
    """
    config, settings = dict(network.checkpoint.config), network.model.config
    count, name = len(network.blocks), type(network.model).__name__
    key = settings.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if settings.get_text_config() is not settings or config.get(key) != count:
        raise UnsupportedModelError(f"config.json of {name} does not say {key} {count}: its blocks cannot be removed")
    for rule, harmless in BLOCK_RULES.items():
        if config.get(rule, harmless) not in (harmless, None):
            raise UnsupportedModelError(
                f"config.json of {name} has {rule}: the kinds of its blocks depend on their numbers"
            )
    for setting, value in {**settings.to_dict(), **config}.items():
        if not isinstance(value, list):
            continue
        if setting in BLOCK_LISTS:
            config[setting] = [kept.index(number) for number in value if number in kept]
        elif len(value) == count and ("layer" in setting or "block" in setting):
            config[setting] = [value[number] for number in kept]
    return {**config, key: len(kept)}


def fewer_blocks_names(network: CheckpointNetwork, kept: Sequence[int]) -> dict[str, str]:
    """Return the name in the new checkpoint of each stored tensor that is kept.

    Raises:
        UnsupportedModelError: the name of a block's tensor does not contain the block's number.
    """
    of_block: dict[str, int] = {}
    for index, block in enumerate(network.blocks):
        of_block |= dict.fromkeys(network.stored_in(block), index)
    places = {old: new for new, old in enumerate(kept)}
    blocks = network.blocks[0].name.split(".")[-2]  # the name of the list of blocks
    names = {}
    for source in network.checkpoint.stored_names():
        number = of_block.get(source)
        if number is None:
            names[source] = source
        elif f"{blocks}.{number}." not in source:
            raise UnsupportedModelError(f"{source} is not named by the number of its block, {number}")
        elif number in places:
            names[source] = source.replace(f"{blocks}.{number}.", f"{blocks}.{places[number]}.", 1)
    return names
