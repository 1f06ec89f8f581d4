"""One small vector per example: the projected gradient of the model's log-odds in the adapter's parameters."""

from .applied_update import transplanted
from .capture import capture_gradients
from .config import CaptureConfig
from .gradients import GradientExtractor
from .identity import model_identity
from .margin import MarginKind, log_odds, margins
from .preconditioner import Preconditioner
from .projection import SeededProjection
from .training_arguments import optimizer_metric, training_recipe

__all__ = [
    "CaptureConfig",
    "GradientExtractor",
    "MarginKind",
    "Preconditioner",
    "SeededProjection",
    "capture_gradients",
    "log_odds",
    "margins",
    "model_identity",
    "optimizer_metric",
    "training_recipe",
    "transplanted",
]
