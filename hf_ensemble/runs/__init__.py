"""A run's directory: the one owner of its file names and of what they hold."""

from .directory import RunDirectory
from .fidelity_report import FidelityReport, FirstOrderError, NoiseCeiling
from .records import (
    EnsembleWeights,
    Estimate,
    Evaluation,
    RunRecord,
    ScoredRun,
    StageRecord,
    TaskRecord,
    TasksRecord,
    TrainedAdapter,
)
from .results import Results, SelectionResult
from .selector import run_selector

__all__ = [
    "EnsembleWeights",
    "Estimate",
    "Evaluation",
    "FidelityReport",
    "FirstOrderError",
    "NoiseCeiling",
    "Results",
    "RunDirectory",
    "RunRecord",
    "ScoredRun",
    "SelectionResult",
    "StageRecord",
    "TaskRecord",
    "TasksRecord",
    "TrainedAdapter",
    "run_selector",
]
