"""Settings of a capture pass."""

from dataclasses import asdict, dataclass, field

from ..errors import ConfigurationError
from ..store.layout import numpy_dtype
from .margin import MARGIN_KINDS
from .preconditioner import PRECONDITIONERS


@dataclass
class CaptureConfig:
    """How gradient features are made and stored.

    Raises:
        `ConfigurationError`: for values outside of their range.
    """

    projection_dim: int | None = field(
        default=4096,
        metadata={
            "help": "Features per example. Wide is better: an estimate reduces them by principal components. "
            "None keeps the exact gradient."
        },
    )
    projection_seed: int = field(default=0, metadata={"help": "Seed of the random projection."})
    margin: str = field(
        default="geometric_mean",
        metadata={"help": "Log-odds of an answer of several tokens: 'geometric_mean' or 'mean_log_odds'."},
    )
    preconditioner: str = field(
        default="adam",
        metadata={
            "help": "Metric of the gradients: 'adam' scales parameters so that the steps of Adam and its kin are "
            "gradient steps; 'none' is for plain SGD."
        },
    )
    feature_dtype: str = field(default="float16", metadata={"help": "Stored precision: 'float16' or 'float32'."})
    batch_size: int = field(default=16, metadata={"help": "Examples per forward and backward pass."})
    max_length: int | None = field(default=None, metadata={"help": "Truncate rows to this many tokens."})

    def __post_init__(self):
        if self.projection_dim is not None and self.projection_dim <= 0:
            raise ConfigurationError(f"projection_dim has to be positive or None, found {self.projection_dim}.")
        if self.batch_size <= 0:
            raise ConfigurationError(f"batch_size has to be positive, found {self.batch_size}.")
        if self.margin not in MARGIN_KINDS:
            raise ConfigurationError(f"margin has to be one of {MARGIN_KINDS}, found {self.margin!r}.")
        if self.preconditioner not in PRECONDITIONERS:
            raise ConfigurationError(
                f"preconditioner has to be one of {PRECONDITIONERS}, found {self.preconditioner!r}."
            )
        numpy_dtype(self.feature_dtype)

    def identity(self) -> dict:
        """The settings that decide the features' values; the batch size does not."""
        return {key: value for key, value in asdict(self).items() if key != "batch_size"}
