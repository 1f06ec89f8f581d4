"""What is said of an argument of the parents that a run of several trainings cannot honour."""

from ...errors import ConfigurationError


def refusal(name: str, because: str, instead: str) -> ConfigurationError:
    """The error that names the argument, the reason and what to do."""
    return ConfigurationError(f"{name} cannot be honoured in a run of several trainings: {because}. Please {instead}.")
