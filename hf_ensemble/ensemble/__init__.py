"""Several adapters over one base model as one model."""

from .config import BaseModelReference, EnsembleMember
from .fitting import WeightFit
from .label_similarity import LabelSimilarityConfig, LabelSimilarityForSequenceClassification
from .merge import MergedAdapter
from .model import PeftEnsembleModel
from .saving import AdapterSource
from .weights import FittedWeights, fit_weights

__all__ = [
    "AdapterSource",
    "BaseModelReference",
    "EnsembleMember",
    "FittedWeights",
    "LabelSimilarityConfig",
    "LabelSimilarityForSequenceClassification",
    "MergedAdapter",
    "PeftEnsembleModel",
    "WeightFit",
    "fit_weights",
]
