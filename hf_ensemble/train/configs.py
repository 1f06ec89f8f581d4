"""Arguments of the trainers: those of `TrainingArguments` and `SFTConfig`, and the settings of every stage."""

from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from .._settings import check_at_least, check_flag, check_number, check_one_of
from ..capture import CaptureConfig, FeatureSettings
from ..errors import ConfigurationError
from ..logging import get_logger
from ..select import GroupingSettings, SelectionSettings

logger = get_logger(__name__)

WEIGHTINGS = ("fitted", "own_group", "answers")
# LoRA needs about ten times the learning rate of full fine-tuning.
ADAPTER_LEARNING_RATE = 2e-4

Config = TypeVar("Config", bound=TrainingArguments)


@dataclass
class RunArguments(FeatureSettings):
    """What the ensemble and the selection trainers share."""

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Initial learning rate. By default 2e-4 for the adapters of a run over several datasets, and the "
            "parent class's own where a single model is trained as it would."
        },
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of the rows of a dataset without evaluation rows that is held out for evaluation: at least "
            "20 rows, at most 500 and never more than half."
        },
    )
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
        check_number("validation_fraction", self.validation_fraction, 0, 1, above=True)
        check_flag("overwrite_run", self.overwrite_run)
        if self.bf16 is None and not self.use_cpu and not torch.accelerator.is_available():
            # trl would refuse these arguments on a machine without an accelerator.
            logger.warning_once(
                "Training on the CPU in float32: bf16 is off. Set bf16=True and use_cpu=True to use it."
            )
            self.bf16 = False
        super().__post_init__()
        self._check_training()
        self.capture_config()

    def _check_training(self) -> None:
        """Refuse values of `TrainingArguments` and `SFTConfig` that fail in the middle of a run, or train nothing."""
        check_at_least("seed", self.seed, 0)
        check_number("learning_rate", self.learning_rate, 0, above=True, optional=True)
        check_at_least("max_steps", self.max_steps, -1)
        check_number("num_train_epochs", self.num_train_epochs, 0, above=self.max_steps <= 0)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("max_length", getattr(self, "max_length", None), 1, optional=True)

    def resolve_learning_rate(self, of_adapters: bool) -> None:
        """Fill in the learning rate that was not given: that of adapters, or the parent class's default."""
        parent = SFTConfig if isinstance(self, SFTConfig) else TrainingArguments
        default = next(own.default for own in fields(parent) if own.name == "learning_rate")
        self.learning_rate = ADAPTER_LEARNING_RATE if of_adapters else default

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
        check_flag("train_baseline", self.train_baseline)
        if self.group_initialization == "baseline" and not self.train_baseline:
            raise ConfigurationError(
                "group_initialization='baseline' begins at the adapter for all tasks, which train_baseline=False does "
                "not train. Leave one of them out."
            )
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

    def __post_init__(self):
        if self.selection_method == "mixture" and self.train_sampling_strategy != "random":
            raise ConfigurationError(
                f"selection_method='mixture' draws rows by their task's weight, expected train_sampling_strategy="
                f"'random', found {self.train_sampling_strategy!r}. Leave one of them out."
            )
        check_flag("meta_initialization", self.meta_initialization)
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


def as_config(args: TrainingArguments, config_class: type[Config]) -> Config:
    """Arguments of a parent class as those of a trainer's own, field by field; its own class is passed through."""
    if isinstance(args, config_class):
        return args
    known = {own.name for own in fields(config_class)}
    shared = [own.name for own in fields(args) if own.init and own.name in known]
    return config_class(**{name: getattr(args, name) for name in shared})
