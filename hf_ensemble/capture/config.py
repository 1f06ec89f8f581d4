"""Settings of a capture pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigurationError
from ..store.layout import FEATURE_DTYPES, stored_dtype
from .margin import MARGIN_KINDS, MarginKind, margin_identity
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
    margin: MarginKind = field(
        default="geometric_mean",
        metadata={
            "help": "Log-odds of an answer of several tokens: 'geometric_mean' or 'mean_log_odds'; or a function from "
            "logits and labels to one number per example, of which log(1 + exp(-m)) is taken for the loss."
        },
    )
    preconditioner: str = field(
        default="adam",
        metadata={
            "help": "Metric of the gradients: 'adam' scales parameters so that the steps of Adam and its kin are "
            "gradient steps, by the second moments of some rows' gradients; 'optimizer' takes them from an optimizer "
            "that has been training; 'none' is for plain SGD."
        },
    )
    feature_dtype: str = field(
        default="float16", metadata={"help": f"Stored precision, one of {', '.join(FEATURE_DTYPES)}."}
    )
    batch_size: int = field(
        default=16, metadata={"help": "Examples per forward and backward pass at most; fewer where memory runs out."}
    )
    max_batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens per forward and backward pass at most, padding included."}
    )
    non_finite: str = field(
        default="error",
        metadata={"help": "Examples whose gradients are not finite: 'error' names them, 'exclude' leaves them out."},
    )
    max_length: int | None = field(default=None, metadata={"help": "Truncate rows to this many tokens."})

    def __post_init__(self):
        if self.projection_dim is not None and self.projection_dim <= 0:
            raise ConfigurationError(f"projection_dim has to be positive or None, found {self.projection_dim}.")
        if self.batch_size <= 0:
            raise ConfigurationError(f"batch_size has to be positive, found {self.batch_size}.")
        if self.max_batch_tokens is not None and self.max_batch_tokens <= 0:
            raise ConfigurationError(f"max_batch_tokens has to be positive or None, found {self.max_batch_tokens}.")
        if self.non_finite not in ("error", "exclude"):
            raise ConfigurationError(f"non_finite has to be 'error' or 'exclude', found {self.non_finite!r}.")
        if self.margin not in MARGIN_KINDS and not callable(self.margin):
            raise ConfigurationError(f"margin has to be one of {MARGIN_KINDS} or a function, found {self.margin!r}.")
        if self.preconditioner not in PRECONDITIONERS:
            raise ConfigurationError(
                f"preconditioner has to be one of {PRECONDITIONERS}, found {self.preconditioner!r}."
            )
        stored_dtype(self.feature_dtype)

    def identity(self) -> dict:
        """The settings that decide the features' values; how many go through the model at once does not."""
        settings = {**vars(self), "margin": margin_identity(self.margin)}
        return {key: value for key, value in settings.items() if key not in ("batch_size", "max_batch_tokens")}


# What settings of one pass may differ in: each is made of the same gradients.
_FREE = ("projection_dim", "projection_seed", "feature_dtype")


def one_pass(configs: Mapping[str, CaptureConfig]) -> dict[str, CaptureConfig]:
    """Several settings by name, after a check that one pass over the model serves them all.

    Raises:
        `ConfigurationError`: for settings that differ in more, and for a name that is no directory's.
    """
    if not configs:
        raise ConfigurationError("Expected at least one CaptureConfig by name, found none.")
    wrong = [name for name in configs if name in ("", ".", "..") or Path(name).name != name]
    if wrong:
        raise ConfigurationError(f"Each setting's name is that of a directory in output_dir, found {wrong[0]!r}.")
    (first, common), *others = configs.items()
    for name, other in others:
        differing = [key for key in vars(common) if key not in _FREE and getattr(common, key) != getattr(other, key)]
        if differing:
            raise ConfigurationError(
                f"The settings {first!r} and {name!r} differ in {differing}; in one pass they may differ in "
                f"{list(_FREE)}. Capture them one after the other."
            )
    return dict(configs)
