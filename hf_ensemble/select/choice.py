"""`Choice`: what selections, mixtures, groupings and example scores have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .._files import named_differences
from .._records import Record
from ..errors import StoreMismatchError
from ..estimate import SubsetEstimator

# Entry of `settings` that holds the estimator's provenance.
_ESTIMATOR = "estimator"
_COMPARED = ("task_names", "features", "recipe")


@dataclass(frozen=True, kw_only=True)
class Choice(Record):
    """A choice made from predictions, with everything needed to make it again from the same features.

    Args:
        summary (`str`): one sentence that says what was chosen and why.
        settings (`dict`):
            Arguments of the [`DataSelector`] method that made the choice, and under `estimator` the provenance of its
            predictions, see [`SubsetEstimator.provenance`].
    """

    # The method of DataSelector that makes such choices.
    made_by: ClassVar[str]

    summary: str
    settings: dict[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        """What the predictions were made from."""
        return self.settings[_ESTIMATOR]

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that make the choice again, see [`DataSelector.repeat`]."""
        return {name: value for name, value in self.settings.items() if name != _ESTIMATOR}

    def check_features(self, estimator: SubsetEstimator) -> None:
        """Check that an estimator predicts from the features that the choice was made from.

        Raises:
            `StoreMismatchError`: for other features; the differences are named.
        """
        found, expected = (
            {name: own.get(name) for name in _COMPARED} for own in (estimator.provenance(), self.provenance)
        )
        differences = list(named_differences(found, expected))
        if differences:
            raise StoreMismatchError(
                f"The choice was made from other features: {'; '.join(differences)}. Capture the original gradients "
                "again, or make a new choice."
            )


def with_provenance(arguments: Mapping[str, Any], estimator: SubsetEstimator) -> dict[str, Any]:
    """The `settings` of a choice that is made with these arguments."""
    return {**arguments, _ESTIMATOR: estimator.provenance()}


def calibration_note(estimator: SubsetEstimator) -> str:
    """A sentence for summaries on how far to trust the predictions; empty for calibrated ones."""
    notes = {
        "observed_runs": "",
        "replay": " The predictions are calibrated by a replayed training only: trust their order more than their "
        "values.",
        "validation_loss": " The predictions are not calibrated and the length of training is unknown: trust neither "
        "their values nor close calls.",
    }
    return notes[estimator.regularization.evidence]
