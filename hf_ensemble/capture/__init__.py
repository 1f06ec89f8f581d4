"""Gradient features: the projected gradient of each example's log-odds with respect to the adapter's parameters."""

from .applied_update import applied_update, parameter_update
from .capture import capture_gradients, encoded_splits
from .config import CaptureConfig, FeatureSettings
from .gradients import GradientExtractor
from .identity import model_identity
from .margin import MarginKind, check_single_answers, log_odds, margins
from .preconditioner import Preconditioner
from .projection import SeededProjection
from .row_update import row_update
from .training_arguments import optimizer_preconditioner, training_recipe

__all__ = [
    "CaptureConfig",
    "FeatureSettings",
    "GradientExtractor",
    "MarginKind",
    "Preconditioner",
    "SeededProjection",
    "applied_update",
    "capture_gradients",
    "check_single_answers",
    "encoded_splits",
    "log_odds",
    "margins",
    "model_identity",
    "optimizer_preconditioner",
    "parameter_update",
    "row_update",
    "training_recipe",
]
