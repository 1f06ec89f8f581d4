"""Capturing gradients inside an otherwise plain training."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from transformers import TrainerCallback

from ..capture import CaptureConfig, capture_gradients, optimizer_metric, training_recipe
from ..errors import ConfigurationError
from ..store import GradientStore
from ..tasks import TaskSet

When = Literal["train_begin", "train_end", "epoch"] | int


class GradientCaptureCallback(TrainerCallback):
    """Captures the gradient features of named datasets in the course of a plain training.

    The training is the same with and without it, to the last bit: the pass leaves parameters, their `.grad`, the
    modes of the modules and the random state as they were.

    Args:
        tasks (`TaskSet`): what to capture; its rows need not be the ones trained on.
        output_dir (`str` or `Path`): the store's directory.
        config (`CaptureConfig`, *optional*): settings of the pass; the optimizer's metric by default.
        when (`str`, *optional*, defaults to `"train_begin"`):
            `"train_begin"` captures at the untrained adapter, which answers what adding or leaving out a task does;
            `"train_end"` at the trained one; `"epoch"` after every epoch and a number after every so many optimizer
            steps, each into a store of its own, `OUTPUT_DIR/epoch-1` or `OUTPUT_DIR/step-100`.
        overwrite (`bool`, *optional*, defaults to `False`): replace a store of another model, data or configuration.

    Attributes:
        store (`GradientStore`): the latest one, `None` before the first.

    At the beginning, the store is told of the training's length and learning rates, which estimates without a true
    fine-tuning are calibrated by: they are for fine-tunings on all of the tasks like this one.

    Of a chat, the assistant's last turn is the answer; an `SFTTrainer` with `assistant_only_loss=False` trains on every
    turn.

    Raises:
        `ConfigurationError`: for another `when`, and for a trainer without a tokenizer.

    Example:

    ```python
    >>> trainer = SFTTrainer(  # doctest: +SKIP
    ...     model, args, train_dataset=dataset, peft_config=LoraConfig(), callbacks=[GradientCaptureCallback(tasks,
    "gradients")] ... )
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
                f"when has to be 'train_begin', 'train_end', 'epoch' or a number of steps, found {when!r}."
            )
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
            # A resumed training begins in the middle; what was captured at its beginning still stands.
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
            raise ConfigurationError("Capturing needs the tokenizer: pass processing_class to the Trainer.")
        metric = optimizer_metric(args)
        config = self.config or CaptureConfig(preconditioner=metric)
        if config.max_length is None:
            # As SFTTrainer truncates.
            config = replace(config, max_length=getattr(args, "max_length", None))
        self.store = capture_gradients(
            model,
            self.tasks,
            config,
            folder,
            processing_class=processing_class,
            overwrite=self.overwrite,
            disable_tqdm=bool(args.disable_tqdm),
            recipe=training_recipe(args, num_steps) if num_steps and config.preconditioner == metric else None,
            optimizer=optimizer,
        )
