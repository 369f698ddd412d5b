"""Evaluation: loss, perplexity, divergence from the dense model, and size."""

from hesse.evaluation.evaluate import Evaluation, EvaluationReport, evaluate_checkpoint

__all__ = ["Evaluation", "EvaluationReport", "evaluate_checkpoint"]
