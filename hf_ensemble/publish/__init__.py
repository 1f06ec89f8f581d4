"""Model card and Hub."""

from .card import card_metadata, renew_model_card, write_model_card
from .card_data import EnsembleCardData, SelectionCardData
from .choice_pictures import draw_choice
from .hub import push_run_to_hub
from .pictures import affinity_heat_map, fidelity_picture
from .report import write_report

__all__ = [
    "EnsembleCardData",
    "SelectionCardData",
    "affinity_heat_map",
    "card_metadata",
    "draw_choice",
    "fidelity_picture",
    "push_run_to_hub",
    "renew_model_card",
    "write_model_card",
    "write_report",
]
