"""A base model of the library's own, and what all models have in common: inputs, answers, memory."""

from .label_similarity import LabelHead, LabelSimilarityConfig, LabelSimilarityForSequenceClassification

__all__ = ["LabelHead", "LabelSimilarityConfig", "LabelSimilarityForSequenceClassification"]
