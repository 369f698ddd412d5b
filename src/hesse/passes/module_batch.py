"""A batch of a user's module, which is a network of one block."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hesse.curvature import Objective


@dataclass(frozen=True, eq=False)
class ModuleBatch:
    """The inputs of one batch of an objective's data."""

    objective: Objective
    inputs: Any

    def pass_block(self, module: nn.Module, index: int) -> None:
        """Run the objective's model on the inputs."""
        self.objective.outputs_once(self.inputs)

    def arguments(self, index: int) -> Any:
        """Return the inputs."""
        return self.inputs
