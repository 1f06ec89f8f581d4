"""How well a model answers rows, independent of the trainer that made it."""

from .evaluator import Evaluator, Scorer
from .scores import RowScores, TaskScores, mean_scores

__all__ = ["Evaluator", "RowScores", "Scorer", "TaskScores", "mean_scores"]
