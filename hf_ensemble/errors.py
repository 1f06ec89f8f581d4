"""Every error this library raises on purpose.

One base class, and each kind also subclasses the builtin that a caller would catch. A message says what was
expected, what was found, and what to do.
"""


class HfEnsembleError(Exception):
    """Base of all errors raised by hf_ensemble.

    Args:
        message (`str`): what was expected and what was found.
        python (`str`, *optional*): what to do, where that is one thing in Python and another in a terminal.
        terminal (`str`, *optional*): the same in the words of the command line.

    Attributes:
        in_terminal (`str`): the whole message as the command line says it.
    """

    def __init__(self, message: str = "", *args: object, python: str | None = None, terminal: str | None = None):
        super().__init__(message if python is None else f"{message} {python}", *args)
        self.in_terminal = str(message) if terminal is None else f"{message} {terminal}"


class TaskError(HfEnsembleError, ValueError):
    """A dataset, its columns, its labels or its splits are not usable as a task."""


class ConfigurationError(HfEnsembleError, ValueError):
    """An argument or a combination of arguments makes no sense."""


class RecordError(HfEnsembleError, ValueError):
    """A JSON file is missing, damaged, or of another format than expected."""


class WriteError(HfEnsembleError, OSError):
    """A file or folder cannot be written: the disk is full, permissions are missing, or something is in the way."""


class ScoringError(HfEnsembleError, RuntimeError):
    """Answers cannot be scored for this model or these rows."""


class CaptureError(ScoringError):
    """Gradients cannot be captured exactly for this model or these examples."""


class StoreError(HfEnsembleError, RuntimeError):
    """A gradient store is missing, unfinished or damaged."""


class StoreLockedError(StoreError):
    """Another process writes into a gradient store."""


class StoreMismatchError(StoreError, ValueError):
    """A gradient store was made with another model, other data or another configuration."""


class EstimationError(HfEnsembleError, ValueError):
    """The features or the requested mixtures do not allow an estimate."""


class RunMismatchError(HfEnsembleError, ValueError):
    """A run directory holds stages of another configuration."""


class RunDivergedError(HfEnsembleError, ArithmeticError):
    """A training ended with a loss or with parameters that are not finite."""


class RunLockedError(HfEnsembleError, RuntimeError):
    """Another process works in the run directory."""


class StageNotReadyError(HfEnsembleError, RuntimeError):
    """A stage of a run needs others that are not done yet."""


class EnsembleError(HfEnsembleError, ValueError):
    """Adapters, weights or tasks of an ensemble do not fit together."""


class EnsembleLoadError(EnsembleError, OSError):
    """A saved ensemble is incomplete, foreign or unsafe to read."""


class CardError(HfEnsembleError, ValueError):
    """A model card cannot be read or updated."""


class PushError(HfEnsembleError, OSError):
    """Something could not be uploaded to the Hub."""
