"""Arguments of the trainers: those of `TrainingArguments` and `SFTConfig`, and the settings of every stage."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from .._settings import (
    Settings,
    check_at_least,
    check_device,
    check_flag,
    check_number,
    check_one_of,
    checks_values,
)
from ..capture import CaptureConfig, FeatureSettings
from ..capture.training_arguments import GivenOptimizer, has_known_steps, optimizer_preconditioner
from ..errors import ConfigurationError
from ..logging import get_logger
from ..select import GroupingSettings, SelectionSettings
from ..select.settings import AUTO_LENGTH, GROUPING_METHODS, LEAST_STEPS, checked_length
from .credentials import is_secret_name
from .inputs.balancing_arguments import ORDERS_OF_DRAWN_ROWS, BalancingArguments
from .inputs.boosting import BoostingSettings
from .inputs.sharding import check_deepspeed_installed
from .inputs.trackers import check_trackers

logger = get_logger(__name__)

AUTO = "auto"
HEADS = ("auto", "label_similarity", "linear")
WEIGHTINGS = ("cross_validated", "fitted", "own_group", "answers")
# LoRA needs about ten times the learning rate of full fine-tuning.
ADAPTER_LEARNING_RATE = 2e-4
# Training cost of an ensemble's adapters, in multiples of one adapter for all tasks.
DEFAULT_BUDGET = 2.0


@dataclass
class RunArguments(BalancingArguments, FeatureSettings):
    """What the ensemble and the selection trainers share."""

    # Names of the fields that a class of the user's has beside these. It is no field of this one.
    kept_fields = ()

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
    streaming_rows: int = field(
        default=1000,
        metadata={
            "help": "Number of first rows of a streaming dataset that stand for it: gradients are captured of them, or "
            "of capture_rows of them, and evaluations see no more. The share validation_fraction of them is held out "
            "where there are no evaluation rows."
        },
    )
    save_report: bool = field(
        default=True,
        metadata={"help": "Write report.html, a page that shows the run, into output_dir when the run ends."},
    )
    capture_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per backward pass of the capture; per_device_eval_batch_size by default."},
    )
    capture_batch_tokens: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens per backward pass of the capture, including padding."}
    )
    num_components: int = field(default=400, metadata={"help": "Principal components that estimates are solved in."})
    estimate_device: str | None = field(
        default=None,
        metadata={"help": "Device that estimates are solved on, such as 'cuda', with float64. The CPU by default."},
    )
    calibration_runs: int = field(
        default=1,
        metadata={
            "help": "Fine-tunings that calibrate the estimates: the first is on all tasks (an ensemble's baseline), "
            "further ones on a few tasks each. 0 replays the training on the captured gradients, which is less exact."
        },
    )
    card_examples: bool = field(
        default=True,
        metadata={
            "help": "Show one prompt of each dataset in the model card, in code that runs as it stands. Set to False "
            "where rows are not to be seen."
        },
    )
    overwrite_run: bool = field(
        default=False, metadata={"help": "Start over when output_dir holds a run of another configuration."}
    )

    def __post_init__(self):
        check_at_least("num_components", self.num_components, 1)
        check_device("estimate_device", self.estimate_device)
        check_at_least("calibration_runs", self.calibration_runs, 0)
        check_number("validation_fraction", self.validation_fraction, 0, 1, above=True)
        check_at_least("streaming_rows", self.streaming_rows, 2)
        check_flag("save_report", self.save_report)
        check_flag("card_examples", self.card_examples)
        check_flag("overwrite_run", self.overwrite_run)
        if self.preconditioner == "optimizer":
            raise ConfigurationError(
                "preconditioner='optimizer' takes the moments of a training that is under way, and a run captures "
                "before it trains. Set preconditioner='auto', or capture by GradientCaptureCallback."
            )
        if self.deepspeed:
            check_deepspeed_installed()
        if self.bf16 is None and not self.use_cpu and not torch.accelerator.is_available():
            # trl would refuse these arguments on a machine without an accelerator.
            logger.warning_once(
                "Training on the CPU in float32: bf16 is off. Set bf16=True and use_cpu=True to use it."
            )
            self.bf16 = False
        super().__post_init__()
        self.check_order(len(set((self.sampling_weights or {}).values()) - {1.0}) > 0)
        check_trackers(self.report_to)
        if checks_values():
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

    def to_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in self.kept_fields if not is_secret_name(name)}
        kept = {name: value.value if isinstance(value, Enum) else value for name, value in kept.items()}
        return {**super().to_dict(), **kept}

    def resolve_learning_rate(self, of_adapters: bool) -> None:
        """Fill in the learning rate that was not given: that of adapters, or the parent class's default."""
        parent = SFTConfig if isinstance(self, SFTConfig) else TrainingArguments
        default = next(own.default for own in fields(parent) if own.name == "learning_rate")
        self.learning_rate = ADAPTER_LEARNING_RATE if of_adapters else default

    def capture_config(self, optimizer: GivenOptimizer | None = None) -> CaptureConfig:
        """Settings of the capture pass, in the precision of the training, and in the metric of its optimizer.

        Args:
            optimizer (`tuple`, *optional*): `optimizer_cls_and_kwargs` of the trainer.
        """
        batch_size = self.per_device_eval_batch_size if self.capture_batch_size is None else self.capture_batch_size
        return CaptureConfig.from_settings(
            self, batch_size=batch_size, max_batch_tokens=self.capture_batch_tokens
        ).resolved(self, optimizer)


@dataclass
class EnsembleArguments(GroupingSettings, BoostingSettings, RunArguments):
    """How tasks are grouped, and adapters combined and boosted.

    By default groups are mixtures of all tasks that go on from the adapter for all tasks, at no more than twice the
    training cost of that adapter. With a number of groups, and with settings that mixtures do not allow, they are a
    partition. Without that adapter they are trained from the start.
    """

    grouping_method: str = field(
        default="auto",
        metadata={
            "help": f"One of {', '.join(GROUPING_METHODS)}; or 'auto': mixtures within compute_budget, or 'direct' "
            "with num_groups (without compute_budget) and with settings that mixtures do not allow."
        },
    )
    compute_budget: float | None = field(
        default=None,
        metadata={
            "help": "With grouping_method='mixtures': maximum training cost of all adapters, in multiples of one "
            "adapter for all tasks, which is included where it is trained. 2.0 by default with grouping_method='auto'; "
            "else the cheapest set of mixtures that is not told apart from the best one."
        },
    )
    group_initialization: str = field(
        default="auto",
        metadata={
            "help": "Where the training of a group's adapter begins: 'fresh' where the adapter for all tasks begins, "
            "'baseline' where that one has ended, to go on for continued_length; or 'auto': 'baseline' where the "
            "adapter for all tasks is trained and no further fine-tunings calibrate."
        },
    )
    train_baseline: bool = field(
        default=True,
        metadata={
            "help": "Also train one adapter on all tasks: the ensemble is compared with it, and it calibrates the "
            "estimates."
        },
    )
    sequential_groups: bool = field(
        default=False,
        metadata={
            "help": "With grouping_method='mixtures': score each group's adapter on the evaluation rows when it is "
            "trained, and choose anew which mixtures are left to train, calibrated by it."
        },
    )
    # With None among the types the parser takes texts; as a value it is refused.
    concurrent_groups: int | str | None = field(
        default=1,
        metadata={
            "help": "Number of groups whose adapters are trained at once: each by its own trainer, with passes "
            "through the base model that are shared. 1 trains one after the other; 'auto' measures on the groups' "
            "first batches whether several at once are faster, and how many."
        },
    )
    ensemble_weights: str = field(
        default="cross_validated",
        metadata={
            "help": "'cross_validated' fits each task's weights to its validation rows and shrinks them as far as "
            "lowers the loss of rows that they were not fitted to. 'fitted' takes the weights with the least "
            "validation loss, 'own_group' only the adapter of the task's own group, 'answers' whichever of the "
            "cross-validated ones, the own group, equal weights and the best single adapter has the best metric of "
            "generated answers."
        },
    )

    def __post_init__(self):
        check_one_of("ensemble_weights", self.ensemble_weights, WEIGHTINGS)
        check_flag("train_baseline", self.train_baseline)
        check_flag("sequential_groups", self.sequential_groups)
        self.concurrent_groups = _checked_concurrency(self.concurrent_groups)
        self.continued_length = checked_length(self.continued_length)
        self._resolve_groups()
        if self.group_initialization == "baseline" and not self.train_baseline:
            raise ConfigurationError(
                "group_initialization='baseline' begins at the adapter for all tasks, which train_baseline=False does "
                "not train. Leave one of them out."
            )
        if self.group_initialization == "baseline" and self.calibration_runs > 1:
            raise ConfigurationError(
                f"calibration_runs={self.calibration_runs} fine-tunes from the start, and with "
                "group_initialization='baseline' the groups go on from the adapter for all tasks, which is predicted "
                "from gradients there. Leave calibration_runs out."
            )
        self._check_groups()
        super().__post_init__()
        self.check_order(self.grouping_method == "mixtures")

    def _check_groups(self) -> None:
        """Refuse settings that would have no effect, and a budget that no group would fit in."""
        if self.sequential_groups and self.grouping_method != "mixtures":
            raise ConfigurationError(
                "sequential_groups=True chooses one mixture after the other; the groups of grouping_method="
                f"{self.grouping_method!r} are chosen together. Set grouping_method='mixtures', or leave it out."
            )
        goes_on = self.group_initialization == "baseline"
        # A number of steps is the same for every training, whatever it is trained on.
        lengths = self.continued_lengths() if goes_on else (1.0,)
        length = min([own for own in lengths if own >= 1 or self.max_steps * own > LEAST_STEPS - 1] or lengths)
        left = (self.compute_budget or 0.0) - float(self.train_baseline)
        if self.max_steps > 0 and self.grouping_method == "mixtures" and 0 < left < length - 1e-9:
            remedy = f"continued_length to {left:g} or less" if goes_on else "num_train_epochs instead of max_steps"
            raise ConfigurationError(
                f"compute_budget={self.compute_budget} leaves {left:g} of a training for the groups, and with "
                f"max_steps={self.max_steps} each of them takes {length:g}: none would be trained. Set {remedy}, or "
                f"compute_budget to {length + float(self.train_baseline):g} or more."
            )

    def _resolve_groups(self) -> None:
        """Fill in what `"auto"` stands for."""
        if self.grouping_method == "auto":
            orders_all_rows = self.train_sampling_strategy not in ORDERS_OF_DRAWN_ROWS
            mixes = self.task_loss_weighting == "tokens" and not (self.overlapping_groups or orders_all_rows)
            # A number of groups is one of a partition: of mixtures it is the largest number.
            mixes = mixes and (self.num_groups is None or self.compute_budget is not None)
            self.grouping_method = "mixtures" if mixes else "direct"
            if mixes and self.compute_budget is None:
                self.compute_budget = DEFAULT_BUDGET
        if self.group_initialization == "auto":
            check_at_least("calibration_runs", self.calibration_runs, 0)
            goes_on = self.train_baseline and self.calibration_runs <= 1
            self.group_initialization = "baseline" if goes_on else "fresh"
        # Adapters that were trained calibrate the predictions of those that are as long; other lengths are replayed.
        is_replayed = has_known_steps(self) and self.preconditioner in ("auto", optimizer_preconditioner(self))
        if self.continued_length == AUTO_LENGTH and (self.sequential_groups or not is_replayed):
            self.continued_length = 1.0


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
        if self.selection_method == "mixture" and self.task_loss_weighting != "tokens":
            raise ConfigurationError(
                "selection_method='mixture' weighs tasks by how often their rows are drawn, and "
                f"task_loss_weighting={self.task_loss_weighting!r} by something else. Leave one of them out."
            )
        check_flag("meta_initialization", self.meta_initialization)
        super().__post_init__()
        self.check_order(self.selection_method == "mixture")


@dataclass
class ClassifierArguments(Settings):
    """How a model for rows of text is loaded by name, and what classifies them."""

    # Parsed from JSON, as `TrainingArguments` does with its own.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    head: str = field(
        default="auto",
        metadata={
            "help": "Head of a text classifier that is given by name: 'label_similarity' (similarity of a text to the "
            "labels' texts, which needs no training to begin with), 'linear' (the checkpoint's own head, or a new and "
            "random one), or 'auto' (linear if the checkpoint has a trained head for as many labels, else "
            "label_similarity)."
        },
    )
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained, as JSON, where the model is given by name."},
    )

    def __post_init__(self):
        check_one_of("head", self.head, HEADS)
        super().__post_init__()


@dataclass
class EnsembleConfig(ClassifierArguments, EnsembleArguments, TrainingArguments):
    """`TrainingArguments` of [`EnsembleTrainer`]."""


@dataclass
class EnsembleSFTConfig(EnsembleArguments, SFTConfig):
    """`SFTConfig` of [`EnsembleSFTTrainer`]."""


@dataclass
class SelectionConfig(ClassifierArguments, SelectionArguments, TrainingArguments):
    """`TrainingArguments` of [`SelectionTrainer`]."""


@dataclass
class SelectionSFTConfig(SelectionArguments, SFTConfig):
    """`SFTConfig` of [`SelectionSFTTrainer`]."""


def _checked_concurrency(value: int | str) -> int | str:
    """A number of groups, which may be given as text, as on a command line, or `"auto"`."""
    if value == AUTO:
        return value
    found = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ConfigurationError(f"concurrent_groups has to be a positive integer or 'auto', found {value!r}.")
    return found
