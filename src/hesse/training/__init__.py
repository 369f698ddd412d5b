"""Methods that need training: one loop over a user's model and data, in which what is held stays held."""

from hesse.training.distillation import Distillation
from hesse.training.held import Held, HeldCodes, HeldZeros, StraightThrough, held_zeros
from hesse.training.loop import Loop, PlainStep, StepRule
from hesse.training.recover import Recovery, recover
from hesse.training.schedules import GradualSchedule
from hesse.training.training import Training, adam, linear_decay

__all__ = [
    "Distillation",
    "GradualSchedule",
    "Held",
    "HeldCodes",
    "HeldZeros",
    "Loop",
    "PlainStep",
    "Recovery",
    "StepRule",
    "StraightThrough",
    "Training",
    "adam",
    "held_zeros",
    "linear_decay",
    "recover",
]
