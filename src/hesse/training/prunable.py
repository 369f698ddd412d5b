"""Select the weights of a network for a pruning method, and check them before any work is done."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from hesse.errors import OptionError, UnsupportedModelError
from hesse.methods import Options, Recipe, find_method

if TYPE_CHECKING:  # which needs transformers, and seconds
    from hesse.networks.network import Layer


def pruning_recipe(method: str, options: Options, layers: Sequence[str], ignore: Sequence[str]) -> Recipe:
    """Return the recipe of `method` for the layers that match one of `layers` and none of `ignore`.

    Raises:
        OptionError: the method makes no zeros, or does not have an option.
    """
    row = find_method(method, "compress", "prune_gradually")
    if "sparse" not in row.constraints:
        raise OptionError(f"the method {method} makes no zeros: `hesse methods` shows which have Sparse")
    return row.recipe(options, tuple(ignore), tuple(layers))


def prunable(model: nn.Module, recipe: Recipe) -> dict[str, "Layer"]:
    """Return the layers that a recipe selects, by the names of their weights in the model.

    Layers that share a weight, such as the projections of torch's own attention, are represented by one of them.

    Raises:
        HesseError: the model has no layers, a pattern matches none, or the recipe does not fit a layer.
    """
    from hesse.layerwise.rules import layer_rules
    from hesse.networks.module_layers import layers_of
    from hesse.networks.torch_attention import split_attentions, stored_as

    with split_attentions(model):
        found, _ = layers_of(model)
        if not found:
            raise UnsupportedModelError(f"{type(model).__name__} has no linear or convolutional layer to prune")
        rules = layer_rules(recipe, found, model)
        return {stored_as(model, layer.weight_name): layer for layer in found if rules[layer.name] is not None}


def prunable_weights(
    model: nn.Module, sparsity: float | str = 0.5, layers: Sequence[str] = ("*",), ignore: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the names of the weights that can be pruned to `sparsity`, for Movement and CrAM.

    Raises:
        HesseError: the model has no such weights, a pattern matches none, or a weight does not fit `sparsity`.
    """
    chosen = prunable(model, pruning_recipe("magnitude", Options(sparsity=sparsity), layers, ignore))
    for name, layer in chosen.items():
        if layer.transposed and isinstance(sparsity, str) and ":" in sparsity:
            raise OptionError(f"{name} is kept as (in, out), so its rows are not those of {sparsity}: ignore its layer")
    return tuple(chosen)
