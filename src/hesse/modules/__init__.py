"""Networks of the user's own: any `torch.nn.Module` and data, through the same methods as checkpoints."""

from hesse.modules.compress import compress_module
from hesse.modules.prune_weights import prune_module
from hesse.modules.report import ModuleReport

__all__ = [
    "ModuleReport",
    "compress_module",
    "prune_module",
]
