"""Fine-tune a language model on many datasets at once.

Everything here is imported on first use, so that `import hf_ensemble` costs nothing.
"""

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

# What bitsandbytes says on a CPU to everyone who imports peft: that it does without a kernel that nobody asked for.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit")
)

_EXPORTS = {
    "tasks": ["DatasetSource", "LabelSpace", "TaskSet", "load_task_folder", "load_tasks"],
    "models": ["LabelSimilarityForSequenceClassification"],
    "store": ["FeatureTable", "GradientStore", "TrainingRecipe"],
    "capture": ["CaptureConfig", "applied_update", "capture_gradients"],
    "estimate": ["ObservedRun", "Prediction", "SubsetEstimator"],
    "select": ["DataSelector", "ExampleScores", "Grouping", "Mixture", "Selection"],
    "ensemble": ["PeftEnsembleModel"],
    "evaluate": ["AnswerMetric"],
    "runs": ["FidelityReport", "RunDirectory"],
    "publish": ["draw_choice", "push_run_to_hub", "write_model_card", "write_report"],
    "callbacks": ["GradientCaptureCallback", "ModelCardCallback", "PushToHubCallback", "TaskMetricsCallback"],
    "train": [
        "BaselineComparison",
        "EnsembleConfig",
        "EnsembleSFTConfig",
        "EnsembleSFTTrainer",
        "EnsembleTrainer",
        "SelectionConfig",
        "SelectionSFTConfig",
        "SelectionSFTTrainer",
        "SelectionTrainer",
        "collect_results",
        "measure_fidelity",
    ],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
