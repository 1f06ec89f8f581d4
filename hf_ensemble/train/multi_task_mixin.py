"""Trainers that make a trainer of their own class for every adapter."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from .._compat import keep_quantized_weights_in_place
from .._files import make_writable_folder
from .._settings import checked_mapping
from ..capture import check_single_answers
from ..ensemble import PeftEnsembleModel
from ..errors import ConfigurationError, TaskError
from ..models.token_checks import check_token_rows
from ..tasks import TASK, TaskCollator, TaskSet
from ..tasks.row_checks import refuse_images
from ..tasks.task import as_dataset, make_task
from .credentials import arguments_without_secrets, check_hub_model_id, forget_secrets_of
from .inputs.balancing import check_loss_weighting, drawn_by
from .inputs.best_metric import check_best_metric
from .inputs.datasets import check_left_rows, check_rows_and_arguments, check_task_names
from .inputs.given_arguments import as_config
from .inputs.parent_arguments import check_parent_arguments
from .inputs.sharding import check_whole, shard
from .inputs.streams import as_table, interleaved
from .inputs.supported import (
    check_before_loading,
    check_callbacks,
    check_is_model,
    check_kinds,
    check_loaded,
    set_padding,
)
from .inputs.used_models import mark_as_of_a_run
from .model_state import ModelState

# For model cards, beside those of the parent.
_TAG = "hf-ensemble"


class MultiTaskMixin:
    """What the trainers over a dict of datasets share.

    Over several datasets and an adapter such a trainer is never trained itself. It makes trainers for single adapters,
    each of the user's own class, so that whatever a subclass overrides or a callback does happens in every training.
    Over one dataset, and where there is no adapter, it trains its model as the parent class does.

    Attributes:
        tasks (`TaskSet`, *optional*): the tasks; `None` over one dataset.
        trains_directly (`bool`): whether this trainer trains its model itself, as the parent class does.
    """

    adapter_trainer_class: ClassVar[type[Trainer]]
    config_class: ClassVar[type[TrainingArguments]]
    needs_adapter: ClassVar[bool] = False
    trains_directly: bool = False
    tasks: TaskSet | None = None
    _streams: Mapping[str, IterableDataset] = MappingProxyType({})
    _model_state: ModelState | None = None

    @property
    def adapter_model(self) -> PeftModel:
        """The model whose adapter is trained: what holds the adapters, where [`model`] is an ensemble of them."""
        return self.model.model if isinstance(self.model, PeftEnsembleModel) else self.model

    def create_accelerator_and_postprocess(self) -> None:
        # The first thing that `Trainer` does with a model: what is recorded here is the model before any trainer.
        if not self.trains_directly and self._model_state is None:
            self._undo_preparation()
            keep_quantized_weights_in_place(self.model)
            self._model_state = ModelState(self.model)
        super().create_accelerator_and_postprocess()

    def _undo_preparation(self) -> None:
        """Take off what a parent's constructor has put on the model already; each adapter's trainer does it again."""

    def _own_args(
        self,
        args: TrainingArguments | None,
        model: str | nn.Module | None,
        of_adapters: bool,
        is_parent: bool,
        is_made_later: bool = False,
    ) -> TrainingArguments:
        """The arguments as this trainer's own class; defaults where there are none. The user's object stays as it is.

        Raises:
            `ConfigurationError`:
                For arguments of another kind, for those of another trainer unless this one is as its parent, and for a
                model that is none.
        """
        check_is_model(model, is_made_later)
        if not (args is None or isinstance(args, TrainingArguments)):
            raise ConfigurationError(
                f"Expected args to be a {self.config_class.__name__}, found a {type(args).__name__}."
            )
        if args is None:
            name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None)
            args = self.config_class(output_dir=f"{Path(name or 'model').name}-{type(self).__name__}")
        args = as_config(args, self.config_class, type(self).__name__, is_parent)
        if args.learning_rate is None:
            # Another trainer that takes the same object may resolve it to another one.
            args = copy.copy(args)
            args.resolve_learning_rate(of_adapters)
        return args

    def _has_adapter(self, model: Any, peft_config: PeftConfig | None) -> bool:
        """Whether the trainer is given an adapter.

        Raises:
            `ConfigurationError`: when there is none and the trainer needs one.
        """
        has_adapter = peft_config is not None or isinstance(model, PeftModel)
        if self.needs_adapter and not has_adapter:
            raise ConfigurationError(
                "A selection compares gradients of an adapter, and there is none. Pass peft_config=LoraConfig(...)."
            )
        return has_adapter

    def _train_directly(self, tasks: TaskSet | None, **kwargs: Any) -> None:
        """Construct this trainer as one that trains its model itself."""
        if tasks is None and getattr(kwargs["args"], "sample_with_replacement", False):
            raise ConfigurationError(
                "sample_with_replacement=True is about how several datasets are drawn from, and over one dataset this "
                "trainer is its parent. Leave it out."
            )
        self.tasks, self.trains_directly = tasks, True
        self.adapter_trainer_class.__init__(self, **kwargs)

    def _draw_from(self, tasks: TaskSet, counts: Callable[[], Mapping[str, int]]) -> None:
        """Settle the tasks and how often their rows are drawn, once the rows are tokens."""
        self.tasks = drawn_by(tasks, self.args, counts)
        self.sampling_weights = self.tasks.sampling_weights

    def _check_arguments(self, tasks: TaskSet, args: TrainingArguments, given: Mapping[str, Any]) -> None:
        """Refuse what a run over several datasets cannot finish, as far as it is known before the model is loaded.

        Args:
            tasks (`TaskSet`): the tasks, with validation rows.
            args (`TrainingArguments`): the trainer's arguments.
            given (`dict`): the constructor's other arguments, by name.

        Raises:
            `ConfigurationError`: for arguments of another kind, and arguments that only a single training takes.
            `TaskError`: for task names that the run uses itself.
            `WriteError`: when nothing can be written into `output_dir`.
        """
        if tuple(given["optimizers"] or (None, None)) != (None, None):
            raise ConfigurationError(
                "An optimizer instance serves one training only, and several adapters are trained. Pass "
                "optimizer_cls_and_kwargs instead of optimizers."
            )
        check_hub_model_id(args.hub_model_id)
        check_parent_arguments(args)
        callbacks = given["callbacks"] if isinstance(given["callbacks"], (list, tuple)) else ()
        check_callbacks(callbacks)
        check_best_metric(args, tasks.names, type(self), given.get("compute_metrics") is not None, callbacks)
        check_rows_and_arguments(tasks, args, self._streams)
        check_single_answers(tasks)
        check_loss_weighting(args, tasks, given.get("compute_loss_func"), tasks.names, isinstance(self, SFTTrainer))
        check_kinds(given)
        check_before_loading(given["model"], given["peft_config"], type(self))
        check_task_names(tasks)
        if args.should_save:
            make_writable_folder(Path(args.output_dir))

    def _finish_init(
        self,
        tasks: TaskSet,
        adapter_trainer_kwargs: dict[str, Any],
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None,
        has_made_adapter: bool,
    ) -> None:
        if has_made_adapter:
            mark_as_of_a_run(self.model.peft_config[self.model.active_adapters[0]])
        forget_secrets_of(self.processing_class)
        check_loaded(self, tasks)
        check_whole(self.model)
        self._draw_from(tasks, self.num_drawn_rows)
        self._adapter_trainer_kwargs, self._first_collator = adapter_trainer_kwargs, self.data_collator.collator
        given = {own if isinstance(own, type) else id(own) for own in callbacks or ()}
        # Those that `Trainer` adds by itself: every adapter's trainer brings its own.
        self._automatic_callbacks = [
            callback
            for callback in self.callback_handler.callbacks
            if id(callback) not in given and type(callback) not in given
        ]
        check_left_rows(tasks, self.train_dataset, self.eval_dataset)
        for rows in (self.train_dataset, *self.eval_dataset.values()):
            check_token_rows(self.model, rows)
        # This trainer never runs the model.
        self._model_state.restore()
        if self._sharding is not None:
            shard(self.model, self._sharding)
            self._model_state.record()
        # The parent has set its own, which were put back.
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags([*getattr(self, "_tag_names", ()), _TAG])
        set_padding(self)

    @property
    def row_collator(self) -> TaskCollator:
        """From rows to a padded batch, one row each: what capture and evaluation take."""
        return self.data_collator

    def num_drawn_rows(self) -> Mapping[str, int]:
        """Number of rows of each task that a training draws from; packed rows count once."""
        return Counter(self.train_dataset[TASK])

    def adapter_trainer(
        self,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Mapping[str, Dataset],
        sampling_weights: Mapping[str, float],
        model: PeftModel | None = None,
    ) -> Trainer:
        """A trainer for the active adapter, of this trainer's own class, as if it were the first on the model.

        It has the attributes that a subclass's constructor has set and the callbacks that this trainer has now, and
        shares no other state. Callbacks with a state of their own (`ExportableState`) are copied, others shared.

        Args:
            args (`TrainingArguments`): its arguments.
            train_dataset (`Dataset`):
                Rows of tokens with `task` and `example_id`; where some are streamed, those that were read say how often
                each task is drawn, and the stream is trained on.
            eval_dataset (`dict[str, Dataset]`): rows of tokens, by task.
            sampling_weights (`dict[str, float]`): relative weight of one row of each task.
            model (`PeftModel`, *optional*): what it trains; this trainer's own model by default.
        """
        if self._streams:
            args = copy.copy(args)
            train_dataset = interleaved(self._streams, train_dataset, sampling_weights, args)
        trainer = object.__new__(type(self))
        trainer.__dict__.update(self.__dict__)
        trainer.trains_directly = True
        self.adapter_trainer_class.__init__(
            trainer,
            model=self.adapter_model if model is None else model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=dict(eval_dataset),
            processing_class=self.processing_class,
            label_space=self.label_space,
            sampling_weights=sampling_weights,
            callbacks=[
                self._own_copy(callback) if isinstance(callback, ExportableState) else callback
                for callback in self.callback_handler.callbacks
                if callback not in self._automatic_callbacks
            ],
            **self._given_to_trainings(),
        )
        for callback in self._automatic_callbacks:
            if callback not in self.callback_handler.callbacks:
                trainer.remove_callback(type(callback))
        return trainer

    def _has_another_collator(self) -> bool:
        """Whether the collator was set after the constructor."""
        return self.data_collator.collator is not self._first_collator

    def _given_to_trainings(self) -> dict[str, Any]:
        """What each training's trainer is constructed with beside its rows: as given, or as this trainer has it now."""
        own = {name: getattr(self, name) for name in ("compute_metrics", "preprocess_logits_for_metrics")}
        found = self._adapter_trainer_kwargs | own
        if self._has_another_collator():
            was_wrapped = isinstance(found["data_collator"], TaskCollator)
            found["data_collator"] = self.data_collator if was_wrapped else self.data_collator.collator
        return found

    def _own_copy(self, callback: TrainerCallback) -> TrainerCallback:
        """A copy of a callback with its state, for one training; what it knows of this trainer is not copied."""
        shared = (self, self.model, self.processing_class, self.train_dataset, self.eval_dataset, self.args)
        return copy.deepcopy(callback, {id(value): value for value in shared})

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback to every training of the run.

        Raises:
            `ConfigurationError`:
                For early stopping where trainings are not evaluated, and callbacks of this package for plain trainers.
        """
        if self.tasks is not None and not self.trains_directly:
            check_callbacks([callback])
            computes_metrics = self.compute_metrics is not None
            check_best_metric(self.args, self.tasks.names, type(self), computes_metrics, [callback])
        super().add_callback(callback)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        if not self.trains_directly:
            raise ConfigurationError(
                f"{type(self).__name__} over several datasets has no hyperparameter_search: a run consists of several "
                "trainings. Search on one dataset, or call train() with different arguments in different output_dirs."
            )
        return super().hyperparameter_search(*args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # The arguments are pickled beside the model.
        own = self.args
        self.args = arguments_without_secrets(own)
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args = own

    def prepare_rows(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        """Raw evaluation rows of known tasks as token tables with `task` and `example_id`.

        Raises:
            `TaskError`: for unknown tasks, and rows that the task or the model cannot take.
        """
        tables = self._token_tables(self._identified(datasets))
        for rows in tables.values():
            check_token_rows(self.adapter_model, rows)
        return tables

    def _direct_rows(self, given: Any, needs_labels: bool = True) -> Any:
        """Rows that a trainer which trains its model itself is asked about, as its parent takes them."""
        raise NotImplementedError

    def _known_tasks(self) -> TaskSet:
        """The tasks that raw rows may be of."""
        return self.tasks

    def _token_tables(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        """Identified rows as token tables."""
        raise NotImplementedError

    def _identified(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        """Check and identify raw rows as the training rows were."""
        known = self._known_tasks().subset(checked_mapping("eval_dataset", datasets, TaskError))
        found = {}
        for name, source in datasets.items():
            if isinstance(source, IterableDataset):
                source = as_table(name, source, self.args.streaming_rows)
            splits = {**known[name].splits, "test": as_dataset(name, source)}
            task = make_task(name, splits, known[name].row_format, known[name].label_names)
            refuse_images(name, "test", task.splits["test"])
            found[name] = task.splits["test"]
        return found
