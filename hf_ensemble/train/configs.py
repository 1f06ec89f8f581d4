"""Arguments of the trainers: those of `TrainingArguments` and `SFTConfig`, and the settings of every stage."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import SFTConfig

from .._settings import check_at_least, check_one_of
from ..capture import CaptureConfig, FeatureSettings
from ..select import GroupingSettings, SelectionSettings

WEIGHTINGS = ("fitted", "own_group", "answers")


@dataclass
class RunArguments(FeatureSettings):
    """What the ensemble and the selection trainers share."""

    capture_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per backward pass of the capture; per_device_eval_batch_size by default."},
    )
    capture_batch_tokens: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens per backward pass of the capture, including padding."}
    )
    num_components: int = field(default=400, metadata={"help": "Principal components that estimates are solved in."})
    calibration_runs: int = field(
        default=1,
        metadata={
            "help": "Fine-tunings that calibrate the estimates: the first is on all tasks (an ensemble's baseline), "
            "further ones on a few tasks each. 0 replays the training on the captured gradients, which is less exact."
        },
    )
    overwrite_run: bool = field(
        default=False, metadata={"help": "Start over when output_dir holds a run of another configuration."}
    )

    def __post_init__(self):
        check_at_least("num_components", self.num_components, 1)
        check_at_least("calibration_runs", self.calibration_runs, 0)
        super().__post_init__()
        self.capture_config()

    def capture_config(self) -> CaptureConfig:
        """Settings of the capture pass, in the precision of the training."""
        batch_size = self.per_device_eval_batch_size if self.capture_batch_size is None else self.capture_batch_size
        return CaptureConfig.from_settings(
            self, batch_size=batch_size, max_batch_tokens=self.capture_batch_tokens
        ).resolved(self)


@dataclass
class EnsembleArguments(GroupingSettings, RunArguments):
    """How tasks are grouped and adapters combined."""

    train_baseline: bool = field(
        default=True,
        metadata={
            "help": "Also train one adapter on all tasks: the ensemble is compared with it, and it calibrates the "
            "estimates."
        },
    )
    ensemble_weights: str = field(
        default="fitted",
        metadata={
            "help": "'fitted' gives each task the weights with the least validation loss, 'own_group' only the adapter "
            "of its own group, 'answers' whichever of these, equal weights and the best single adapter has the best "
            "metric of generated answers."
        },
    )

    def __post_init__(self):
        check_one_of("ensemble_weights", self.ensemble_weights, WEIGHTINGS)
        super().__post_init__()


@dataclass
class SelectionArguments(SelectionSettings, RunArguments):
    """How auxiliary tasks are chosen for a target."""

    meta_initialization: bool = field(
        default=False,
        metadata={
            "help": "First train the adapter on all tasks, and take gradients and the final fine-tuning from there."
        },
    )


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
