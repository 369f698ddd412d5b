"""The verbs on a network in memory: any `torch.nn.Module` and data, through the same methods as checkpoints."""

from hesse.modules.report import ModuleReport

__all__ = ["ModuleReport"]
