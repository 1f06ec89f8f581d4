"""Trainers that make a trainer of their own class for every adapter."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from .._compat import keep_quantized_weights_in_place
from ..errors import ConfigurationError, TaskError
from ..logging import get_logger
from ..tasks import TASK, TaskSet
from ..tasks.task_set import as_dataset, make_task
from .model_state import ModelState
from .supported import check_loaded, set_padding
from .used_models import mark_as_of_a_run

logger = get_logger(__name__)

# Task names that would collide with names of metrics or of adapters.
_RESERVED = ("mean", "overall")


class MultiTaskMixin:
    """What the trainers over a dict of datasets share.

    Such a trainer is never trained itself. It makes trainers for single adapters, each of the user's own class, so that
    whatever a subclass overrides or a callback does happens in every training.

    Attributes:
        tasks (`TaskSet`): the tasks.
        is_adapter_trainer (`bool`): whether this is a trainer for a single adapter.
    """

    adapter_trainer_class: ClassVar[type[Trainer]]
    config_class: ClassVar[type[TrainingArguments]]
    is_adapter_trainer: bool = False
    tasks: TaskSet
    _model_state: ModelState | None = None

    def create_accelerator_and_postprocess(self) -> None:
        # The first thing that `Trainer` does with a model: what is recorded here is the model before any trainer.
        if not self.is_adapter_trainer and self._model_state is None:
            self._undo_preparation()
            keep_quantized_weights_in_place(self.model)
            self._model_state = ModelState(self.model)
        super().create_accelerator_and_postprocess()

    def _undo_preparation(self) -> None:
        """Take off what a parent's constructor has put on the model already; each adapter's trainer does it again."""

    def _checked_args(self, args: Any, model: Any) -> TrainingArguments:
        """The trainer's own arguments; defaults where there are none.

        Raises:
            `ConfigurationError`: for arguments of another class.
        """
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            return self.config_class(output_dir=f"{Path(name or 'model').name}-{type(self).__name__}")
        if not isinstance(args, self.config_class):
            raise ConfigurationError(
                f"Expected args to be a {self.config_class.__name__}, found a {type(args).__name__}. It takes the same "
                "arguments: change the class's name."
            )
        return args

    def _finish_init(
        self,
        tasks: TaskSet,
        adapter_trainer_kwargs: dict[str, Any],
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None,
        optimizers: Any,
        has_made_adapter: bool,
    ) -> None:
        if tuple(optimizers or (None, None)) != (None, None):
            raise ConfigurationError(
                "An optimizer instance serves one training only, and several adapters are trained. Pass "
                "optimizer_cls_and_kwargs instead of optimizers."
            )
        if not isinstance(self.model, PeftModel):
            raise ConfigurationError(
                f"Expected a model with an adapter, found a plain {type(self.model).__name__}. Pass "
                "peft_config=LoraConfig(...)."
            )
        if has_made_adapter:
            mark_as_of_a_run(self.model.peft_config[self.model.active_adapters[0]])
        if self.compute_metrics is not None:
            logger.warning(
                "compute_metrics is used by evaluations during each training; the evaluation of the whole run reports "
                "loss and accuracy."
            )
        reserved = sorted(name for name in tasks if name in _RESERVED or name.startswith("baseline"))
        if reserved:
            raise TaskError(f"The task names {reserved} are used for metrics of the whole run: rename these tasks.")
        check_loaded(self, tasks)
        self.tasks = tasks
        self._adapter_trainer_kwargs = adapter_trainer_kwargs
        given = {id(callback) for callback in callbacks or ()} | set(callbacks or ())
        # Those that `Trainer` adds by itself: every adapter's trainer brings its own.
        self._automatic_callbacks = [
            callback
            for callback in self.callback_handler.callbacks
            if id(callback) not in given and type(callback) not in given
        ]
        lost = sorted(set(tasks.names) - set(self.train_dataset.unique(TASK)))
        lost += [name for name, rows in self.eval_dataset.items() if len(rows) == 0]
        if lost:
            raise TaskError(f"No row of the tasks {lost} is left after tokenization: raise max_length.")
        # This trainer never runs the model.
        self._model_state.restore()
        set_padding(self)

    def adapter_trainer(
        self,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Mapping[str, Dataset],
        sampling_weights: Mapping[str, float],
    ) -> Trainer:
        """A trainer for the active adapter, of this trainer's own class, as if it were the first on the model.

        It has the attributes that a subclass's constructor has set and the callbacks that this trainer has now, and
        shares no other state. Callbacks with a state of their own (`ExportableState`) are copied, others shared.

        Args:
            args (`TrainingArguments`): its arguments.
            train_dataset (`Dataset`): rows of tokens with `task` and `example_id`.
            eval_dataset (`dict[str, Dataset]`): rows of tokens, by task.
            sampling_weights (`dict[str, float]`): relative weight of one row of each task.
        """
        trainer = object.__new__(type(self))
        trainer.__dict__.update(self.__dict__)
        trainer.is_adapter_trainer = True
        self.adapter_trainer_class.__init__(
            trainer,
            model=self.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=dict(eval_dataset),
            processing_class=self.processing_class,
            label_space=self.label_space,
            sampling_weights=sampling_weights,
            callbacks=[
                copy.deepcopy(callback) if isinstance(callback, ExportableState) else callback
                for callback in self.callback_handler.callbacks
                if callback not in self._automatic_callbacks
            ],
            **self._adapter_trainer_kwargs,
        )
        for callback in self._automatic_callbacks:
            if callback not in self.callback_handler.callbacks:
                trainer.remove_callback(type(callback))
        return trainer

    def prepare_rows(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        """Raw evaluation rows of known tasks as token tables with `task` and `example_id`."""
        raise NotImplementedError

    def _identified(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        """Check and identify raw rows as the training rows were."""
        known = self.tasks.subset(datasets)
        rows = {name: as_dataset(name, source) for name, source in datasets.items()}
        return {name: make_task(name, {**known[name].splits, "test": rows[name]}).splits["test"] for name in rows}
