"""Gradient features on disk: a self-describing directory, written in shards and memory-mapped for reading."""

from .layout import has_every_file
from .locks import exclusive_writers
from .multi_writer import GradientStoreWriters
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
    "exclusive_writers",
    "has_every_file",
]
