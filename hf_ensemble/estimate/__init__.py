"""Predicts the outcome of fine-tuning on any subset or mixture of tasks from gradient features."""

from .boosting import LINEAR_METHODS, LinearStep, linear_step
from .calibration import LossCalibration
from .estimator import SubsetEstimator
from .prediction import Prediction
from .reduction import FeatureReduction
from .regularization import ObservedRun, Regularization, choose_regularization
from .surrogate import SurrogateProblem, SurrogateSolution, solve_surrogate

__all__ = [
    "LINEAR_METHODS",
    "FeatureReduction",
    "LinearStep",
    "LossCalibration",
    "ObservedRun",
    "Prediction",
    "Regularization",
    "SubsetEstimator",
    "SurrogateProblem",
    "SurrogateSolution",
    "choose_regularization",
    "linear_step",
    "solve_surrogate",
]
