"""What every choice says about the predictions that it was made from, and how it is made again."""

from collections.abc import Mapping
from typing import Any

from .._files import named_differences
from ..errors import StoreMismatchError
from ..estimate import SubsetEstimator


def caution(estimator: SubsetEstimator) -> str:
    """A sentence for `why`: how far the predictions are to be trusted; empty for calibrated ones."""
    cautions = {
        "observed_runs": "",
        "replay": " Not calibrated by a true fine-tuning, but by a replay: trust the order more than the values.",
        "validation_loss": " Nothing says how long the training is: trust neither the values nor close calls.",
    }
    return cautions[estimator.regularization.evidence]


def settings_of(estimator: SubsetEstimator, own: dict[str, Any]) -> dict[str, Any]:
    """A choice's own settings, and beside them what its predictions were made from."""
    return {**own, "estimator": estimator.provenance()}


def check_same_features(estimator: SubsetEstimator, settings: Mapping[str, Any]) -> None:
    """Refuse to make a choice again from other features than its own.

    Raises:
        `StoreMismatchError`: that names what differs.
    """
    compared = ("task_names", "features", "recipe")
    found, expected = estimator.provenance(), settings["estimator"]
    differences = list(
        named_differences({key: found[key] for key in compared}, {key: expected[key] for key in compared})
    )
    if differences:
        raise StoreMismatchError(
            f"The choice was made from other features than these: {'; '.join(differences)}. Capture the gradients that "
            "it was made from again, or choose anew."
        )
