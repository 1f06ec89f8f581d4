"""Trackers that a run is asked to report to."""

import importlib.util
from collections.abc import Sequence

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ...errors import ConfigurationError

# Those whose package has the tracker's name.
_PACKAGES = ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab", "trackio", "wandb")


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigurationError` for trackers that do not exist or are not installed, before anything is loaded."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigurationError(
                f"report_to={name!r} is no tracker, expected one of {known}, or 'none'. Set report_to='none'."
            )
        if name in get_available_reporting_integrations():
            continue
        package = name if name in _PACKAGES else "tensorboard" if name == "tensorboard" else None
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigurationError(
                f"report_to={name!r} needs the package {package}, which is not installed: pip install {package}, or "
                "set report_to='none'."
            )
