"""Callbacks for any plain `Trainer` or `SFTTrainer`."""

from .gradient_capture import GradientCaptureCallback

__all__ = ["GradientCaptureCallback"]
