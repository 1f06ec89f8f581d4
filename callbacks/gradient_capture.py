"""Captures gradients inside a plain trainer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from trl import SFTConfig

from .._settings import check_flag, checked_path
from ..capture import CaptureConfig, capture_gradients, encoded_splits, optimizer_preconditioner, training_recipe
from ..capture.training_arguments import GivenOptimizer
from ..errors import ConfigurationError, StoreError, WriteError
from ..logging import get_logger
from ..models.kinds import check_kind, check_outputs
from ..models.wrappers import unwrapped
from ..store import GradientStore
from ..tasks import TaskSet
from .host_rows import check_against_trained, sft_splits

logger = get_logger(__name__)

When = Literal["train_begin", "train_end", "epoch"] | int


class GradientCaptureCallback(TrainerCallback):
    """Captures the gradient features of named datasets during a plain training.

    The training is bitwise identical with and without the callback: parameters, their `.grad`, module modes and the
    random state are left unchanged.

    With `when="train_begin"` and `"train_end"`, the store also records the length and learning rates of the training.
    They calibrate estimates without an observed run, which then assume a fine-tuning like this one on all of the tasks,
    from where the gradients were captured.

    What is captured is what is trained on. For an `SFTTrainer`, rows become tokens and labels as its arguments have it:
    completions or all tokens, every turn of the assistant or the whole chat, cut at `max_length`, and each row on its
    own where the trainer packs them. For a plain `Trainer`, which gets tokens, completions and the assistant's last
    turn are captured. When training begins, the labels are compared with those of the trainer's batches. A loss of the
    trainer's own (`compute_loss_func`, label smoothing) does not change what is captured: the gradient of the answer's
    log-odds.

    Args:
        tasks (`TaskSet`): tasks to capture; their rows may differ from the training rows.
        output_dir (`str` or `Path`): directory of the store.
        config (`CaptureConfig`, *optional*):
            Settings of the pass. `"auto"` values follow the trainer's optimizer and precision.
        when (`str` or `int`, *optional*, defaults to `"train_begin"`):
            `"train_begin"` captures at the untrained adapter, to predict the effect of adding or dropping tasks;
            `"train_end"` at the trained one, to predict how trainings go on from it. `"epoch"` captures after every
            epoch and a number after that many optimizer steps, each into a store of its own, `OUTPUT_DIR/epoch-1` or
            `OUTPUT_DIR/step-100`. A last epoch that the training does not finish has its number and the step that it
            ended at, `OUTPUT_DIR/epoch-2-step-130`.
        overwrite (`bool`, *optional*, defaults to `False`): replace a store of another model, other data or settings.
        formatting_func (`Callable`, *optional*): that of the `SFTTrainer`, where it has one.

    Attributes:
        store (`GradientStore`): the latest store, `None` before the first capture.

    Raises:
        `ConfigurationError`:
            For arguments of another kind, and numbers of captured rows of unknown tasks. In the trainer's constructor,
            without a tokenizer, for models of another kind (token classifiers, masked language models), and for models
            that have no answers of the rows' kind. When training begins, for a row that is trained on with other labels
            than it is captured with.
        `TaskError`: in the trainer's constructor, for rows that cannot be encoded.
        `StoreError`: when training begins, for a store of another model, other data or settings. During and after the
            training of a single process it is logged, and so is a `WriteError`.

    Example:

    ```python
    >>> callback = GradientCaptureCallback(tasks, "gradients")
    >>> trainer = SFTTrainer(  # doctest: +SKIP
    ...     model, args, train_dataset=dataset, peft_config=LoraConfig(), callbacks=[callback]
    ... )
    ```
    """

    def __init__(
        self,
        tasks: TaskSet,
        output_dir: str | Path,
        config: CaptureConfig | None = None,
        when: When = "train_begin",
        overwrite: bool = False,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ):
        is_number = isinstance(when, int) and not isinstance(when, bool) and when > 0
        if when not in ("train_begin", "train_end", "epoch") and not is_number:
            raise ConfigurationError(
                f"when has to be 'train_begin', 'train_end', 'epoch' or a positive number of steps, found {when!r}."
            )
        if not isinstance(tasks, TaskSet):
            raise ConfigurationError(
                f"Expected tasks to be a TaskSet, found a {type(tasks).__name__}. Make one with TaskSet.from_datasets."
            )
        if config is not None and not isinstance(config, CaptureConfig):
            raise ConfigurationError(f"Expected config to be a CaptureConfig, found {config!r:.60}.")
        if config is not None:
            config.check_limited_tasks(tasks.names)
        check_flag("overwrite", overwrite)
        # Raises now for tasks without validation rows, and not when training begins.
        tasks.split("validation")
        self.tasks = tasks
        self.output_dir = checked_path("output_dir", output_dir)
        self.config = config
        self.when = when
        self.overwrite = overwrite
        self.formatting_func = formatting_func
        self.store: GradientStore | None = None
        self._encoded: Mapping[str, Dataset] | None = None

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        # Whatever is wrong with the rows is said before anything is trained.
        self._encode(args, model, processing_class)

    def on_train_begin(
        self, args, state, control, model=None, processing_class=None, train_dataloader=None, optimizer=None, **kwargs
    ):
        is_resumed = state is not None and state.global_step > 0
        if self.when == "train_begin" and is_resumed:
            # It starts midway; the store from its start is still valid.
            self.store = GradientStore(self.output_dir)
            return
        if self._encoded is None:
            # Added to the trainer after its constructor.
            self._encode(args, model, processing_class)
        check_against_trained(self._encoded["train"], train_dataloader)
        if self.when == "train_begin":
            steps = state.max_steps if state else None
            self._capture(args, model, processing_class, self.output_dir, steps, trained_by=optimizer)

    def on_epoch_end(self, args, state, control, model=None, processing_class=None, optimizer=None, **kwargs):
        if self.when == "epoch":
            folder = self.output_dir / _epoch_name(state)
            self._capture_later(args, model, processing_class, folder, optimizer=optimizer)

    def on_step_end(self, args, state, control, model=None, processing_class=None, optimizer=None, **kwargs):
        if isinstance(self.when, int) and state.global_step % self.when == 0:
            folder = self.output_dir / f"step-{state.global_step}"
            self._capture_later(args, model, processing_class, folder, optimizer=optimizer)

    def on_train_end(self, args, state, control, model=None, processing_class=None, optimizer=None, **kwargs):
        if self.when == "train_end":
            self._capture_later(args, model, processing_class, self.output_dir, state.max_steps, optimizer=optimizer)

    def _capture_later(self, args, model, processing_class, folder: Path, num_steps=None, optimizer=None) -> None:
        """Capture during or after a training, which is worth more than a store that cannot be written there."""
        try:
            self._capture(args, model, processing_class, folder, num_steps, optimizer)
        except (StoreError, WriteError) as error:
            if args.world_size > 1:
                # The other processes wait for what this one would have done next.
                raise
            logger.error("The gradients were not captured, and the training goes on without them: %s", error)

    def _config(self, args, given: GivenOptimizer | None = None) -> CaptureConfig:
        config = (self.config or CaptureConfig()).resolved(args, given)
        # SFTTrainer truncates its rows to this length.
        return config if config.max_length else replace(config, max_length=getattr(args, "max_length", None))

    def _encode(self, args, model, processing_class) -> None:
        if processing_class is None:
            raise ConfigurationError(
                "Expected a trainer with a tokenizer, found none. Pass processing_class to the Trainer."
            )
        check_kind(model)
        max_length = self._config(args).max_length
        if isinstance(args, SFTConfig):
            self._encoded = sft_splits(self.tasks, processing_class, args, self.formatting_func, max_length)
        else:
            self._encoded = encoded_splits(model, self.tasks, processing_class, max_length)
        check_outputs(unwrapped(model), self.tasks.label_space)
        if _has_another_loss(args):
            logger.warning(
                "Gradients are captured of the answers' log-odds, and the training has another loss "
                "(label_smoothing_factor or loss_type). Predictions are of the likelihood: pass the losses of a "
                "fine-tuning as ObservedRun to calibrate them."
            )

    def _capture(
        self, args, model, processing_class, folder: Path, num_steps=None, optimizer=None, trained_by=None
    ) -> None:
        given = _given_optimizer(args, optimizer if trained_by is None else trained_by)
        config = self._config(args, given)
        # What the training does can be replayed on what is captured.
        is_replayed = config.preconditioner == optimizer_preconditioner(args, given) and not _has_another_loss(args)
        self.store = capture_gradients(
            model,
            self.tasks,
            config,
            folder,
            processing_class=processing_class,
            encoded=self._encoded,
            overwrite=self.overwrite,
            disable_tqdm=bool(args.disable_tqdm),
            recipe=training_recipe(args, num_steps, given) if num_steps and is_replayed else None,
            optimizer=optimizer,
        )


def _epoch_name(state: TrainerState) -> str:
    """The name of an epoch that has ended, whole or not: after 2.2 epochs, the second and the third are two stores."""
    number = math.ceil(state.epoch)
    return f"epoch-{number}" if state.epoch == number else f"epoch-{number}-step-{state.global_step}"


def _given_optimizer(args: TrainingArguments, optimizer: torch.optim.Optimizer | None) -> GivenOptimizer | None:
    """Class and arguments of a trainer's optimizer that is not the one of its arguments; `None` for that one."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    options = {name: getattr(optimizer, "defaults", {}).get(name) for name in ("lr", "momentum")}
    if options["lr"] is None:
        # None yet, or that of an engine, which the arguments or a file of its own settle.
        return None
    given = (type(optimizer), options)
    is_of_arguments = optimizer_preconditioner(args, given) == optimizer_preconditioner(args)
    is_of_arguments = is_of_arguments and options["lr"] == args.learning_rate and not options["momentum"]
    return None if is_of_arguments else given


def _has_another_loss(args: TrainingArguments) -> bool:
    """Whether arguments say that the loss is not the answers' likelihood."""
    return args.label_smoothing_factor > 0 or getattr(args, "loss_type", "nll") != "nll"
