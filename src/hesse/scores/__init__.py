"""Scores: what changing or removing a part of a network costs, for parts of any partition, in one table."""

from hesse.scores.attack import Attack
from hesse.scores.evidence import LossEvidence, StoredWeights
from hesse.scores.score import SCORES, Score, find_score, register_score

__all__ = ["SCORES", "Attack", "LossEvidence", "Score", "StoredWeights", "find_score", "register_score"]
