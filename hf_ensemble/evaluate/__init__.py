"""How well a model answers rows, independent of the trainer that made it."""

from .answer_metric import AnswerMetric, AnswerMetrics, metrics_by_task
from .answers import AnswerEvaluator, Generate
from .evaluator import Evaluator, Scorer
from .scores import RowScores, TaskScores, mean_scores

__all__ = [
    "AnswerEvaluator",
    "AnswerMetric",
    "AnswerMetrics",
    "Evaluator",
    "Generate",
    "RowScores",
    "Scorer",
    "TaskScores",
    "mean_scores",
    "metrics_by_task",
]
