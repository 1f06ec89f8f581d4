"""Trainers over many datasets: an ensemble of adapters, or one adapter for a target."""

from .arguments import EnsembleConfig, EnsembleSFTConfig, SelectionConfig, SelectionSFTConfig
from .ensemble_trainer import EnsembleSFTTrainer, EnsembleTrainer
from .fidelity import measure_fidelity
from .fidelity_report import FidelityReport
from .selection_trainer import SelectionSFTTrainer, SelectionTrainer

__all__ = [
    "EnsembleConfig",
    "EnsembleSFTConfig",
    "EnsembleSFTTrainer",
    "EnsembleTrainer",
    "FidelityReport",
    "SelectionConfig",
    "SelectionSFTConfig",
    "SelectionSFTTrainer",
    "SelectionTrainer",
    "measure_fidelity",
]
