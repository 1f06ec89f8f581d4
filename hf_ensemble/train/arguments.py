"""Settings of the trainers, on top of `TrainingArguments` and `SFTConfig`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import SFTConfig

from ..capture import CaptureConfig, optimizer_preconditioner
from ..errors import ConfigurationError
from ..select import GROUPING_METHODS, SELECTION_METHODS

WEIGHTINGS = ("fitted", "own_group")


@dataclass
class EstimateArguments:
    """What the ensemble and the selection trainers share."""

    projection_dim: int | None = field(
        default=4096, metadata={"help": "Gradient features per example; None keeps the exact gradient."}
    )
    projection_seed: int = field(default=0, metadata={"help": "Seed of the random projection."})
    margin: str = field(
        default="geometric_mean",
        metadata={"help": "Log-odds of an answer of several tokens: 'geometric_mean' or 'mean_log_odds'."},
    )
    preconditioner: str = field(
        default="auto",
        metadata={
            "help": "Metric of the gradients: 'adam' scales parameters so that the steps of Adam and its kin are "
            "gradient steps, 'none' is for plain SGD, 'auto' goes by the optimizer."
        },
    )
    feature_dtype: str = field(
        default="float16", metadata={"help": "Stored precision: 'float16', 'bfloat16' or 'float32'."}
    )
    capture_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per backward pass of the capture; per_device_eval_batch_size by default."},
    )
    capture_batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens per backward pass of the capture at most, padding included."}
    )
    non_finite: str = field(
        default="error",
        metadata={"help": "Examples whose gradients are not finite: 'error' names them, 'exclude' leaves them out."},
    )
    num_components: int = field(default=400, metadata={"help": "Principal components that estimates are solved in."})
    calibration_runs: int = field(
        default=1,
        metadata={
            "help": "Fine-tunings that calibrate the estimates: the first is on all tasks (an ensemble's baseline), "
            "further ones on a few tasks each. 0: the training is replayed on the captured gradients, less exactly."
        },
    )
    overwrite_run: bool = field(
        default=False, metadata={"help": "Start over when output_dir holds a run of another configuration."}
    )

    def __post_init__(self):
        if self.num_components <= 0:
            raise ConfigurationError(f"num_components has to be positive, found {self.num_components}.")
        if not isinstance(self.calibration_runs, int) or self.calibration_runs < 0:
            raise ConfigurationError(f"calibration_runs has to be 0 or more, found {self.calibration_runs!r}.")
        super().__post_init__()
        self.capture_config()

    def capture_config(self) -> CaptureConfig:
        """The capture pass's own settings."""
        return CaptureConfig(
            projection_dim=self.projection_dim,
            projection_seed=self.projection_seed,
            margin=self.margin,
            preconditioner=optimizer_preconditioner(self) if self.preconditioner == "auto" else self.preconditioner,
            feature_dtype=self.feature_dtype,
            batch_size=self.per_device_eval_batch_size if self.capture_batch_size is None else self.capture_batch_size,
            max_batch_tokens=self.capture_batch_tokens,
            non_finite=self.non_finite,
        )


@dataclass
class EnsembleArguments(EstimateArguments):
    """How tasks are grouped and adapters combined."""

    num_groups: int | None = field(
        default=None, metadata={"help": "Groups, one adapter each; None chooses the number by predicted loss."}
    )
    max_groups: int | None = field(
        default=None, metadata={"help": "Most groups to consider when the number is chosen."}
    )
    grouping_method: str = field(
        default="direct", metadata={"help": "'direct', 'spectral', 'semidefinite' or 'coclustering'."}
    )
    overlapping_groups: bool = field(
        default=False, metadata={"help": "Let a group train on tasks of other groups that help its own."}
    )
    num_subsets: int = field(default=400, metadata={"help": "Random subsets whose outcomes make the affinity."})
    train_baseline: bool = field(
        default=True,
        metadata={
            "help": "Also train one adapter on all tasks: what the ensemble is compared with, and the evidence that "
            "the estimates are calibrated by."
        },
    )
    ensemble_weights: str = field(
        default="fitted",
        metadata={"help": "'fitted': least validation loss of each task; 'own_group': the task's own group alone."},
    )

    def __post_init__(self):
        for name in ("num_groups", "max_groups"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name} has to be a positive number or None, found {value!r}.")
        if self.grouping_method not in GROUPING_METHODS:
            raise ConfigurationError(
                f"grouping_method has to be one of {GROUPING_METHODS}, found {self.grouping_method!r}."
            )
        if self.ensemble_weights not in WEIGHTINGS:
            raise ConfigurationError(
                f"ensemble_weights has to be one of {WEIGHTINGS}, found {self.ensemble_weights!r}."
            )
        super().__post_init__()


@dataclass
class SelectionArguments(EstimateArguments):
    """How auxiliary tasks are chosen for a target."""

    selection_method: str = field(
        default="forward",
        metadata={"help": "'forward', 'backward', 'exhaustive', 'random_ensemble', 'mixture', or a baseline."},
    )
    max_auxiliary: int | None = field(default=None, metadata={"help": "Auxiliary tasks to take at most."})
    meta_initialization: bool = field(
        default=False,
        metadata={
            "help": "First train the adapter on all tasks, and take gradients and the final fine-tuning from there."
        },
    )

    def __post_init__(self):
        if self.selection_method not in SELECTION_METHODS:
            raise ConfigurationError(
                f"selection_method has to be one of {SELECTION_METHODS}, found {self.selection_method!r}."
            )
        super().__post_init__()


@dataclass
class EnsembleConfig(EnsembleArguments, TrainingArguments):
    """`TrainingArguments` of [`EnsembleTrainer`]."""


@dataclass
class EnsembleSFTConfig(EnsembleArguments, SFTConfig):
    """`SFTConfig` of [`EnsembleSFTTrainer`]."""


@dataclass
class SelectionConfig(SelectionArguments, TrainingArguments):
    """`TrainingArguments` of [`SelectionTrainer`]."""


@dataclass
class SelectionSFTConfig(SelectionArguments, SFTConfig):
    """`SFTConfig` of [`SelectionSFTTrainer`]."""
