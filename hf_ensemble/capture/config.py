"""Settings of a capture pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .._settings import Settings, check_at_least, check_one_of
from ..errors import ConfigurationError
from ..logging import get_logger
from ..store.layout import FEATURE_DTYPES
from .margin import MARGIN_KINDS, margin_identity
from .preconditioner import PRECONDITIONERS
from .row_sample import RowLimit, check_limited_tasks, checked_limit, num_captured
from .training_arguments import GivenOptimizer, optimizer_preconditioner

logger = get_logger(__name__)

MIXED_PRECISIONS = ("no", "bf16")
# Settings that do not change the features. Which rows are left out has a place of its own in a store's identity: limits
# that no task exceeds make the same store.
_NOT_IN_IDENTITY = ("batch_size", "max_batch_tokens", "capture_rows", "capture_validation_rows", "capture_seed")
# Training rows of a task, and validation rows: more hardly better predictions, see benchmarks/captured_rows.
DEFAULT_ROWS = 512
# By split, the setting that limits the rows of a task.
ROW_LIMITS = {"train": "capture_rows", "validation": "capture_validation_rows"}
# Settings that may differ between the stores of one pass: all of them are made from the same gradients.
_PER_STORE = ("projection_dim", "projection_seed", "feature_dtype")


@dataclass
class FeatureSettings(Settings):
    """What gradient features are made of.

    Raises:
        `ConfigurationError`: for values out of range.
    """

    projection_dim: int | None = field(
        default=4096,
        metadata={
            "help": "Number of gradient features per example. Larger is better: estimates reduce them to principal "
            "components. None (null on the command line) keeps the exact gradient."
        },
    )
    projection_seed: int = field(default=0, metadata={"help": "Seed of the random projection."})
    margin: str = field(
        default="geometric_mean",
        metadata={
            "help": "Log-odds of an answer with multiple tokens: 'geometric_mean' or 'mean_log_odds'. In Python also a "
            "function from logits and labels to one number m per example, whose loss is taken to be log(1 + exp(-m))."
        },
    )
    preconditioner: str = field(
        default="auto",
        metadata={
            "help": "Scaling of the gradients: 'adam' for Adam and related optimizers, from the second moments of some "
            "rows' gradients; 'none' for plain SGD; 'auto' chooses 'adam' or 'none' by the trainer's optimizer, and "
            "'adam' without a trainer. In GradientCaptureCallback and capture_gradients also 'optimizer': the moments "
            "of the optimizer of a training that is under way."
        },
    )
    feature_dtype: str = field(
        default="float16", metadata={"help": f"Data type of stored features, one of {', '.join(FEATURE_DTYPES)}."}
    )
    non_finite: str = field(
        default="error",
        metadata={"help": "Examples with gradients that are not finite: 'error' names them, 'exclude' drops them."},
    )

    capture_rows: int | str | dict | None = field(
        default=DEFAULT_ROWS,
        metadata={
            "help": "Most training rows of a task that gradients are captured of, or JSON by task: "
            "'{\"gsm8k\": 2000}'. Of a task with more, a sample that is stratified by label stands for all of them; "
            "predictions are of trainings on all rows. null captures all."
        },
    )
    capture_validation_rows: int | str | dict | None = field(
        default=DEFAULT_ROWS,
        metadata={"help": "The same for validation rows, whose mean is the predicted loss."},
    )
    capture_seed: int = field(default=0, metadata={"help": "Seed of the samples of rows that are captured."})

    def __post_init__(self):
        for name in ROW_LIMITS.values():
            setattr(self, name, checked_limit(name, getattr(self, name)))
        check_at_least("capture_seed", self.capture_seed, 0)
        check_at_least("projection_dim", self.projection_dim, 1, optional=True)
        check_at_least("projection_seed", self.projection_seed, 0)
        if not callable(self.margin):
            check_one_of("margin", self.margin, MARGIN_KINDS)
        check_one_of("preconditioner", self.preconditioner, ("auto", *PRECONDITIONERS))
        check_one_of("feature_dtype", self.feature_dtype, FEATURE_DTYPES)
        check_one_of("non_finite", self.non_finite, ("error", "exclude"))
        super().__post_init__()

    def check_limited_tasks(self, tasks: Sequence[str]) -> None:
        """Check that the numbers of rows by task are of these tasks.

        Raises:
            `ConfigurationError`: for unknown tasks.
        """
        for name in ROW_LIMITS.values():
            check_limited_tasks(name, getattr(self, name), tasks)

    def row_limit(self, split: str) -> RowLimit:
        """Most rows of a task that are captured: a number, or numbers by task."""
        return getattr(self, ROW_LIMITS[split]) if split in ROW_LIMITS else None

    def num_captured_rows(self, split: str, num_rows: Mapping[str, int]) -> int:
        """How many rows are captured of tasks with these numbers of rows."""
        limit = self.row_limit(split)
        return sum(num_captured(limit, task, count) for task, count in num_rows.items())


@dataclass
class CaptureConfig(FeatureSettings):
    """Settings of a capture pass: what the features are made of, and how the model runs.

    Raises:
        `ConfigurationError`: for values out of range.
    """

    batch_size: int = field(
        default=16,
        metadata={"help": "Maximum number of examples per forward and backward pass. Halved when memory runs out."},
    )
    max_batch_tokens: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens per forward and backward pass, including padding."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Truncate rows to this number of tokens."})
    mixed_precision: str = field(
        default="auto",
        metadata={
            "help": "Precision of the forward and backward passes: 'no' for the model's own, 'bf16' for autocast to "
            "bfloat16, 'auto' for the trainer's (fp16 counts as 'no'), and 'no' without a trainer."
        },
    )

    def __post_init__(self):
        check_at_least("batch_size", self.batch_size, 1)
        for name in ("max_batch_tokens", "max_length"):
            check_at_least(name, getattr(self, name), 1, optional=True)
        check_one_of("mixed_precision", self.mixed_precision, ("auto", *MIXED_PRECISIONS))
        super().__post_init__()

    @classmethod
    def from_settings(cls, settings: FeatureSettings, **others: Any) -> "CaptureConfig":
        """Combine the feature settings of a [`FeatureSettings`], such as a trainer's arguments, with other fields."""
        return cls(**{own.name: getattr(settings, own.name) for own in fields(FeatureSettings)}, **others)

    def resolved(
        self, args: TrainingArguments | None = None, optimizer: GivenOptimizer | None = None
    ) -> "CaptureConfig":
        """Replace `"auto"` by the values that fit a trainer.

        Args:
            args (`TrainingArguments`, *optional*): the trainer's arguments.
            optimizer (`tuple`, *optional*): class and arguments of an optimizer that the trainer is given.
        """
        preconditioner, mixed_precision = self.preconditioner, self.mixed_precision
        if preconditioner == "auto":
            preconditioner = "adam" if args is None else optimizer_preconditioner(args, optimizer)
        if mixed_precision == "auto":
            mixed_precision = "bf16" if args is not None and args.bf16 else "no"
            if args is not None and args.fp16:
                logger.info(
                    "Gradients are captured without fp16: without loss scaling, fp16 gradients of single examples "
                    "underflow."
                )
        return replace(self, preconditioner=preconditioner, mixed_precision=mixed_precision)

    def identity(self) -> dict[str, Any]:
        """The settings that determine the features, as JSON values; `"auto"` has to be resolved."""
        settings = {**vars(self), "margin": margin_identity(self.margin)}
        return {name: value for name, value in settings.items() if name not in _NOT_IN_IDENTITY}


def check_single_pass(configs: Mapping[str, CaptureConfig]) -> None:
    """Check that one pass over the model can fill a store for each of the named configs.

    Raises:
        `ConfigurationError`: for no config, names that are not folder names, and configs that differ too much.
    """
    if not configs:
        raise ConfigurationError("Expected at least one CaptureConfig by name, found none.")
    for name in configs:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ConfigurationError(f"Expected plain folder names as keys of the configs, found {name!r}.")
    (first, common), *others = configs.items()
    for name, other in others:
        differing = [
            key for key in vars(common) if key not in _PER_STORE and getattr(common, key) != getattr(other, key)
        ]
        if differing:
            raise ConfigurationError(
                f"The configs {first!r} and {name!r} differ in {differing}; in one pass they may only differ in "
                f"{list(_PER_STORE)}. Capture them in separate passes."
            )
