"""Training: one loop over a user's model and data that keeps zeros, codes and other constraints of weights."""

from hesse.training.compression_aware import CompressionAware
from hesse.training.finetune import FinetuneReport, finetune
from hesse.training.held import Held, HeldCodes, HeldSigns, HeldZeros, OneBit, StraightThrough, held_zeros
from hesse.training.loop import StepRule, TrainingLoop
from hesse.training.movement import Movement
from hesse.training.prunable import prunable_weights
from hesse.training.schedules import GradualSchedule
from hesse.training.training import Distillation, Training, adam, linear_decay

__all__ = [
    "CompressionAware",
    "Distillation",
    "FinetuneReport",
    "GradualSchedule",
    "Held",
    "HeldCodes",
    "HeldSigns",
    "HeldZeros",
    "Movement",
    "OneBit",
    "StepRule",
    "StraightThrough",
    "Training",
    "TrainingLoop",
    "adam",
    "finetune",
    "held_zeros",
    "linear_decay",
    "prunable_weights",
]
