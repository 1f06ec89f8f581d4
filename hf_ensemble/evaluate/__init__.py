"""How well a model answers rows, independent of the trainer that made it."""

from .answer_metric import AnswerMetric, AnswerMetrics, metrics_by_task
from .answers import AnswerEvaluator, AnswerFigures, Generate
from .evaluator import Evaluator, Scorer
from .row_intervals import Difference, Interval, SystemIntervals, system_intervals
from .scores import RowScores, TaskScores, mean_scores

__all__ = [
    "AnswerEvaluator",
    "AnswerFigures",
    "AnswerMetric",
    "AnswerMetrics",
    "Difference",
    "Evaluator",
    "Generate",
    "Interval",
    "RowScores",
    "Scorer",
    "SystemIntervals",
    "TaskScores",
    "mean_scores",
    "metrics_by_task",
    "system_intervals",
]
