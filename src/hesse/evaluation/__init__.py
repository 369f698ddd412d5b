"""Evaluation: loss, perplexity, divergence from the dense model, and size."""

from hesse.evaluation.evaluate import Evaluation, evaluate_checkpoint

__all__ = ["Evaluation", "evaluate_checkpoint"]
