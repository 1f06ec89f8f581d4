"""Base models, and what is asked of any model's inputs and outputs."""

from .label_similarity import LabelSimilarityConfig, LabelSimilarityForSequenceClassification

__all__ = ["LabelSimilarityConfig", "LabelSimilarityForSequenceClassification"]
