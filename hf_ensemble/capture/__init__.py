"""One small vector per example: the projected gradient of the model's log-odds in the adapter's parameters."""

from .capture import capture_gradients
from .config import CaptureConfig
from .gradients import GradientExtractor, evaluation_mode
from .identity import model_identity
from .margin import MarginKind, log_odds, margins
from .preconditioner import Preconditioner
from .projection import SeededProjection
from .recipe import optimizer_metric, training_recipe
from .transplant import transplanted

__all__ = [
    "CaptureConfig",
    "GradientExtractor",
    "MarginKind",
    "Preconditioner",
    "SeededProjection",
    "capture_gradients",
    "evaluation_mode",
    "log_odds",
    "margins",
    "model_identity",
    "optimizer_metric",
    "training_recipe",
    "transplanted",
]
