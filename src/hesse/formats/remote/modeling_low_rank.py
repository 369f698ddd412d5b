"""A transformers architecture whose named linear layers are two thin ones.

`config.json` gives `low_rank`, a table from a layer's name to its rank, and names classes of this file as
`LowRank_<class of transformers>`; they are made when they are asked for. Weights: `<layer>.0.weight` (rank, in),
`<layer>.1.weight` (out, rank), `<layer>.1.bias`, and an empty `<layer>.weight` that makes classes which do not know of
the factors fail instead of running with random weights. Written by Hesse; needs only transformers.
"""

import re
import sys

import transformers
from torch import nn
from transformers import PretrainedConfig, conversion_mapping

TYPE_PREFIX = "low_rank_"
CLASS_PREFIX = "LowRank_"


def factorise(model: nn.Module, ranks: dict[str, int]) -> None:
    """Put two thin linear layers in the place of each layer named in `ranks`."""
    base = model.base_model_prefix + "."
    modules = dict(model.named_modules())
    for stored, rank in ranks.items():
        name = next((n for n in (stored, stored.removeprefix(base), base + stored) if n in modules), None)
        if name is None:
            raise ValueError(f"low_rank names {stored}, which {type(model).__name__} does not have")
        layer = modules[name]
        rows, columns = layer.weight.shape
        if type(layer).__name__ == "Conv1D":
            rows, columns = columns, rows
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        thin = nn.Sequential(
            nn.Linear(columns, rank, bias=False, **place),
            nn.Linear(rank, rows, bias=layer.bias is not None, **place),
        )
        thin.in_features, thin.out_features = columns, rows
        model.set_submodule(name, thin)


def config_class(base: type) -> type:
    """`base` under the model type that this file serves."""
    return type(
        CLASS_PREFIX + base.__name__, (base,), {"model_type": TYPE_PREFIX + base.model_type, "__module__": __name__}
    )


def model_class(base: type) -> type:
    """`base` with factorised layers; names of stored tensors are converted as transformers does for `base`."""
    original = base.config_class.model_type
    conversion = conversion_mapping.get_checkpoint_conversion_mapping(base.__name__)
    conversion = conversion or conversion_mapping.get_checkpoint_conversion_mapping(original)
    if conversion is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(TYPE_PREFIX + original, conversion, overwrite=True)

    def __init__(self, config, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        factorise(self, config.low_rank)
        guards = {re.escape(name) + r"\.weight$" for name in config.low_rank}
        self._keys_to_ignore_on_load_unexpected = set(self._keys_to_ignore_on_load_unexpected or ()) | guards

    own_config = getattr(sys.modules[__name__], CLASS_PREFIX + base.config_class.__name__)
    members = {"__init__": __init__, "__module__": __name__, "config_class": own_config}
    return type(CLASS_PREFIX + base.__name__, (base,), members)


def __getattr__(name: str) -> type:
    if not name.startswith(CLASS_PREFIX):
        raise AttributeError(name)
    base = getattr(transformers, name.removeprefix(CLASS_PREFIX))
    made = config_class(base) if issubclass(base, PretrainedConfig) else model_class(base)
    setattr(sys.modules[__name__], name, made)
    return made
