"""A run's directory: the one owner of its file names and of what they hold."""

from .boosting import Boosting, BoostingStep
from .comparison import ComparedSystem, Comparison
from .costs import Costs, StageCost, SystemCost
from .directory import RunDirectory
from .evaluation import EvaluatedRows, Evaluation, RowFigures
from .example_rows import ExampleRows, ShownRow, TaskRows
from .fidelity_report import FidelityReport, FirstOrderError, NoiseCeiling
from .progress import StageProgress, run_progress
from .records import (
    Concurrency,
    ConcurrencyTrial,
    EnsembleWeights,
    Estimate,
    RunRecord,
    ScoredRun,
    StageRecord,
    TaskRecord,
    TasksRecord,
    TrainedAdapter,
)
from .results import Results, SelectionResult
from .run_results import run_results
from .selector import run_selector

__all__ = [
    "Boosting",
    "BoostingStep",
    "ComparedSystem",
    "Comparison",
    "Concurrency",
    "ConcurrencyTrial",
    "Costs",
    "EnsembleWeights",
    "Estimate",
    "EvaluatedRows",
    "Evaluation",
    "ExampleRows",
    "FidelityReport",
    "FirstOrderError",
    "NoiseCeiling",
    "Results",
    "RowFigures",
    "RunDirectory",
    "RunRecord",
    "ScoredRun",
    "SelectionResult",
    "ShownRow",
    "StageCost",
    "StageProgress",
    "StageRecord",
    "SystemCost",
    "TaskRecord",
    "TaskRows",
    "TasksRecord",
    "TrainedAdapter",
    "run_progress",
    "run_results",
    "run_selector",
]
