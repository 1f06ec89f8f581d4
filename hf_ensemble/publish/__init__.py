"""Model card and Hub."""

from .card import EnsembleCardData, write_model_card
from .hub import push_ensemble_to_hub

__all__ = ["EnsembleCardData", "push_ensemble_to_hub", "write_model_card"]
