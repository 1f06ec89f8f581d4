"""Model card and Hub."""

from .card import EnsembleCardData, card_metadata, write_model_card
from .choice_pictures import draw_choice
from .hub import push_ensemble_to_hub
from .pictures import affinity_heat_map, fidelity_picture
from .report import write_report

__all__ = [
    "EnsembleCardData",
    "affinity_heat_map",
    "card_metadata",
    "draw_choice",
    "fidelity_picture",
    "push_ensemble_to_hub",
    "write_model_card",
    "write_report",
]
