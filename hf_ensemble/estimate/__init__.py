"""Predicts the outcome of fine-tuning on any subset or mixture of tasks from gradient features."""

from .calibration import LossCalibration
from .estimator import SubsetEstimator
from .prediction import Prediction
from .reduction import FeatureReduction
from .regularization import ObservedRun, Regularization, choose_regularization
from .surrogate import SurrogateProblem, SurrogateSolution, solve_surrogate

__all__ = [
    "FeatureReduction",
    "LossCalibration",
    "ObservedRun",
    "Prediction",
    "Regularization",
    "SubsetEstimator",
    "SurrogateProblem",
    "SurrogateSolution",
    "choose_regularization",
    "solve_surrogate",
]
