"""Several adapters over one base model as one model."""

from .members import BaseModelReference, EnsembleMember
from .merging.merge import MergedAdapter
from .model import PeftEnsembleModel
from .saving.mixin import AdapterSource
from .weighting.fitting import WeightFit, fit_ensemble
from .weighting.objectives import FittedWeights, fit_weights

__all__ = [
    "AdapterSource",
    "BaseModelReference",
    "EnsembleMember",
    "FittedWeights",
    "MergedAdapter",
    "PeftEnsembleModel",
    "WeightFit",
    "fit_ensemble",
    "fit_weights",
]
