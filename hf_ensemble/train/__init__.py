"""Trainers over many datasets: an ensemble of adapters, or one adapter for a target."""

from .comparison import BASELINES, BaselineComparison
from .configs import EnsembleConfig, EnsembleSFTConfig, SelectionConfig, SelectionSFTConfig
from .ensemble_trainer import EnsembleSFTTrainer, EnsembleTrainer
from .fidelity import measure_fidelity
from .results import collect_results
from .selection_trainer import SelectionSFTTrainer, SelectionTrainer

__all__ = [
    "BASELINES",
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
]
