"""Gradient features on disk: a directory that explains itself, written in shards, mapped when read."""

from .multi_writer import GradientStoreWriters, sole_writers
from .reader import FeatureTable, GradientStore
from .recipe import TrainingRecipe
from .writer import CapturedRows, GradientStoreWriter

__all__ = [
    "CapturedRows",
    "FeatureTable",
    "GradientStore",
    "GradientStoreWriter",
    "GradientStoreWriters",
    "TrainingRecipe",
    "sole_writers",
]
