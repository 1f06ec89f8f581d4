"""Captures gradients inside a plain trainer."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from transformers import TrainerCallback

from ..capture import CaptureConfig, capture_gradients, optimizer_preconditioner, training_recipe
from ..errors import ConfigurationError
from ..store import GradientStore
from ..tasks import TaskSet

When = Literal["train_begin", "train_end", "epoch"] | int


class GradientCaptureCallback(TrainerCallback):
    """Captures the gradient features of named datasets during a plain training.

    The training is bitwise identical with and without the callback: parameters, their `.grad`, module modes and the
    random state are left unchanged.

    With `when="train_begin"`, the store also records the length and learning rates of the training. They calibrate
    estimates without an observed run, which then assume a fine-tuning like this one on all of the tasks.

    In a chat, the assistant's last turn is the answer, while an `SFTTrainer` with `assistant_only_loss=False` trains on
    every turn.

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
        `ConfigurationError`: for an invalid `when`, and for a trainer without a tokenizer.

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
        # Raises now for tasks without validation rows, and not when training begins.
        tasks.split("validation")
        self.tasks = tasks
        self.output_dir = Path(output_dir)
        self.config = config
        self.when = when
        self.overwrite = overwrite
        self.store: GradientStore | None = None

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

    def _capture(self, args, model, processing_class, folder: Path, num_steps=None, optimizer=None) -> None:
        if processing_class is None:
            raise ConfigurationError(
                "Expected a trainer with a tokenizer, found none. Pass processing_class to the Trainer."
            )
        config = (self.config or CaptureConfig()).resolved(args)
        if config.max_length is None:
            # SFTTrainer truncates its rows to this length.
            config = replace(config, max_length=getattr(args, "max_length", None))
        matches_optimizer = config.preconditioner == optimizer_preconditioner(args)
        self.store = capture_gradients(
            model,
            self.tasks,
            config,
            folder,
            processing_class=processing_class,
            overwrite=self.overwrite,
            disable_tqdm=bool(args.disable_tqdm),
            recipe=training_recipe(args, num_steps) if num_steps and matches_optimizer else None,
            optimizer=optimizer,
        )
