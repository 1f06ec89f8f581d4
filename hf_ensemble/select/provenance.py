"""What every choice says about the predictions that it was made from."""

from typing import Any

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
    """A choice's own settings and the estimator's: what makes it again from the same features."""
    return {
        **own,
        "num_components": estimator.reduction.components.shape[1],
        "l2_scale": estimator.regularization.l2_scale,
        "l2_evidence": estimator.regularization.evidence,
    }
