"""A base model of the library's own, and what all models have in common: inputs, answers, memory."""

from .label_similarity import LabelSimilarityConfig, LabelSimilarityForSequenceClassification

__all__ = ["LabelSimilarityConfig", "LabelSimilarityForSequenceClassification"]
