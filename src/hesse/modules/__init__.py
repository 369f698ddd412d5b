"""Networks of the user's own: any `torch.nn.Module` and data, through the same methods as checkpoints."""

from hesse.modules.attack import Attack
from hesse.modules.compress import compress_module
from hesse.modules.prune import prune_module
from hesse.modules.report import ModuleReport
from hesse.modules.scores import SCORES

__all__ = ["SCORES", "Attack", "ModuleReport", "compress_module", "prune_module"]
