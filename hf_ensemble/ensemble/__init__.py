"""Several adapters over one base model as one model."""

from .forward.router import PromptRouter
from .members import BaseModelReference, EnsembleMember
from .merging.merge import MergedAdapter
from .model import PeftEnsembleModel
from .saving.mixin import AdapterSource
from .weighting.fitting import WeightFit, fit_ensemble, fit_router
from .weighting.objectives import FittedWeights, fit_weights
from .weighting.router_fitting import RouterFit

__all__ = [
    "AdapterSource",
    "BaseModelReference",
    "EnsembleMember",
    "FittedWeights",
    "MergedAdapter",
    "PeftEnsembleModel",
    "PromptRouter",
    "RouterFit",
    "WeightFit",
    "fit_ensemble",
    "fit_router",
    "fit_weights",
]
