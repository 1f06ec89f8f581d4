"""Callbacks for any plain `Trainer` or `SFTTrainer`."""

from .gradient_capture import GradientCaptureCallback
from .publishing import ModelCardCallback, PushToHubCallback
from .task_metrics import TaskMetricsCallback

__all__ = ["GradientCaptureCallback", "ModelCardCallback", "PushToHubCallback", "TaskMetricsCallback"]
