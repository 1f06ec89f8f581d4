"""Captures gradients inside a plain trainer."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from .._settings import check_flag, checked_path
from ..capture import CaptureConfig, capture_gradients, encoded_splits, optimizer_preconditioner, training_recipe
from ..errors import ConfigurationError
from ..store import GradientStore
from ..tasks import RowFormat, TaskSet

When = Literal["train_begin", "train_end", "epoch"] | int


class GradientCaptureCallback(TrainerCallback):
    """Captures the gradient features of named datasets during a plain training.

    The training is bitwise identical with and without the callback: parameters, their `.grad`, module modes and the
    random state are left unchanged.

    With `when="train_begin"`, the store also records the length and learning rates of the training. They calibrate
    estimates without an observed run, which then assume a fine-tuning like this one on all of the tasks.

    What is captured is what is trained on: completions, and the assistant's turn of a chat. An `SFTTrainer` that trains
    on more than these is refused.

    Args:
        tasks (`TaskSet`): tasks to capture; their rows may differ from the training rows.
        output_dir (`str` or `Path`): directory of the store.
        config (`CaptureConfig`, *optional*):
            Settings of the pass. `"auto"` values follow the trainer's optimizer and precision.
        when (`str` or `int`, *optional*, defaults to `"train_begin"`):
            `"train_begin"` captures at the untrained adapter, to predict the effect of adding or dropping tasks;
            `"train_end"` at the trained one. `"epoch"` captures after every epoch and a number after that many
            optimizer steps, each into a store of its own, `OUTPUT_DIR/epoch-1` or `OUTPUT_DIR/step-100`.
        overwrite (`bool`, *optional*, defaults to `False`): replace a store of another model, other data or settings.

    Attributes:
        store (`GradientStore`): the latest store, `None` before the first capture.

    Raises:
        `ConfigurationError`:
            For arguments of another kind. In the trainer's constructor: without a tokenizer, and for a loss over other
            tokens than the captured ones.
        `TaskError`: in the trainer's constructor, for rows that cannot be encoded.

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
        check_flag("overwrite", overwrite)
        # Raises now for tasks without validation rows, and not when training begins.
        tasks.split("validation")
        self.tasks = tasks
        self.output_dir = checked_path("output_dir", output_dir)
        self.config = config
        self.when = when
        self.overwrite = overwrite
        self.store: GradientStore | None = None
        self._encoded: Mapping[str, Dataset] | None = None

    def on_init_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        # Whatever is wrong with the rows is said before anything is trained.
        self._encode(args, model, processing_class)

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if self.when != "train_begin":
            return
        if state is not None and state.global_step > 0:
            # A resumed training starts midway; the store from its start is still valid.
            self.store = GradientStore(self.output_dir)
        else:
            num_steps = state.max_steps if state is not None else None
            self._capture(args, model, processing_class, self.output_dir, num_steps)

    def on_epoch_end(self, args, state, control, model=None, processing_class=None, optimizer=None, **kwargs):
        if self.when == "epoch":
            folder = self.output_dir / f"epoch-{round(state.epoch)}"
            self._capture(args, model, processing_class, folder, optimizer=optimizer)

    def on_step_end(self, args, state, control, model=None, processing_class=None, optimizer=None, **kwargs):
        if isinstance(self.when, int) and state.global_step % self.when == 0:
            folder = self.output_dir / f"step-{state.global_step}"
            self._capture(args, model, processing_class, folder, optimizer=optimizer)

    def on_train_end(self, args, state, control, model=None, processing_class=None, optimizer=None, **kwargs):
        if self.when == "train_end":
            self._capture(args, model, processing_class, self.output_dir, optimizer=optimizer)

    def _config(self, args) -> CaptureConfig:
        config = (self.config or CaptureConfig()).resolved(args)
        # SFTTrainer truncates its rows to this length.
        return config if config.max_length else replace(config, max_length=getattr(args, "max_length", None))

    def _encode(self, args, model, processing_class) -> None:
        if processing_class is None:
            raise ConfigurationError(
                "Expected a trainer with a tokenizer, found none. Pass processing_class to the Trainer."
            )
        _check_loss(self.tasks, args)
        self._encoded = encoded_splits(model, self.tasks, processing_class, self._config(args).max_length)

    def _capture(self, args, model, processing_class, folder: Path, num_steps=None, optimizer=None) -> None:
        if self._encoded is None:
            # Added to the trainer after its constructor.
            self._encode(args, model, processing_class)
        config = self._config(args)
        matches_optimizer = config.preconditioner == optimizer_preconditioner(args)
        self.store = capture_gradients(
            model,
            self.tasks,
            config,
            folder,
            processing_class=processing_class,
            encoded=self._encoded,
            overwrite=self.overwrite,
            disable_tqdm=bool(args.disable_tqdm),
            recipe=training_recipe(args, num_steps) if num_steps and matches_optimizer else None,
            optimizer=optimizer,
        )


def _check_loss(tasks: TaskSet, args: TrainingArguments) -> None:
    """Raise `ConfigurationError` for an `SFTTrainer` whose loss is over other tokens than the captured answers."""
    if tasks.row_format is RowFormat.PROMPT_COMPLETION and getattr(args, "completion_only_loss", None) is False:
        raise ConfigurationError(
            "Gradients are captured of completions, and completion_only_loss=False also trains on the prompts. Leave "
            "completion_only_loss unset."
        )
    if tasks.row_format is not RowFormat.CHAT or not hasattr(args, "assistant_only_loss"):
        return
    if not args.assistant_only_loss:
        raise ConfigurationError(
            "Gradients are captured of the assistant's turn, and a chat's every token is trained on. Set "
            "assistant_only_loss=True, or make the columns prompt and completion of the messages."
        )
    for name, rows in tasks.split("train").items():
        turns = max(sum(message["role"] == "assistant" for message in chat) for chat in rows["messages"])
        if turns > 1:
            raise ConfigurationError(
                f"Gradients are captured of the assistant's last turn, and all turns are trained on: expected chats "
                f"with one turn of the assistant, found {turns} in a chat of task {name!r}. Make a row of each turn, "
                "with the columns prompt and completion."
            )
