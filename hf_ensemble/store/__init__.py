"""Gradient features on disk: a self-describing directory, written in shards and read in blocks."""

from .features import Features, StoredFeatures, column_blocks, row_blocks, take_rows
from .layout import has_every_file, num_shards
from .locks import exclusive_writers, shared_records
from .multi_writer import GradientStoreWriters
from .reader import FeatureTable, GradientStore
from .recipe import TrainingRecipe
from .writer import CapturedRows, GradientStoreWriter

__all__ = [
    "CapturedRows",
    "FeatureTable",
    "Features",
    "GradientStore",
    "GradientStoreWriter",
    "GradientStoreWriters",
    "StoredFeatures",
    "TrainingRecipe",
    "column_blocks",
    "exclusive_writers",
    "num_shards",
    "row_blocks",
    "shared_records",
    "take_rows",
    "has_every_file",
]
