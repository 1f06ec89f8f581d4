"""Trainers over a dict of datasets: one table of tokens, one adapter at its start, and trainers for single adapters."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState
from trl import SFTConfig

from .._compat import keep_quantized_weights_in_place
from ..errors import ConfigurationError, TaskError
from ..logging import get_logger
from ..tasks import TASK, LabelSpace, RowFormat, TaskSet, data_collator_for, encode, length_limit
from ..tasks.task_set import as_dataset, make_task
from .model_state import ModelState
from .task_trainer import TaskSFTTrainer, TaskTrainer
from .used_models import without_adapters_of_earlier_runs

logger = get_logger(__name__)

# Task names that would collide with names of metrics or of adapters.
_RESERVED = ("mean", "overall")


def as_task_set(train_dataset: Any, eval_dataset: Any) -> TaskSet:
    """The trainers' datasets as tasks.

    Raises:
        `TaskError`: for anything but named datasets.
    """
    if isinstance(train_dataset, TaskSet):
        if eval_dataset is not None:
            raise TaskError("A TaskSet brings its own evaluation rows: do not pass eval_dataset beside it.")
        return train_dataset
    for name, value in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if not isinstance(value, Mapping) and not (name == "eval_dataset" and value is None):
            raise TaskError(f"Expected {name} to be a dict of named datasets, found {type(value).__name__}.")
    return TaskSet.from_datasets(train_dataset, eval_dataset)


def check_labels(model, label_space: LabelSpace | None) -> None:
    """Raise `ConfigurationError` when a classifier's head has another number of outputs than the tasks' labels."""
    if label_space is not None and model.config.num_labels != len(label_space):
        raise ConfigurationError(
            f"The tasks have {len(label_space)} different labels, the model's head has {model.config.num_labels} "
            f"outputs. Load the model with num_labels={len(label_space)}, in the order of TaskSet.label_space.names."
        )


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
        if self.compute_metrics is not None:
            logger.warning(
                "compute_metrics is used by evaluations during each training; the evaluation of the whole run reports "
                "loss and accuracy."
            )
        reserved = sorted(name for name in tasks if name in _RESERVED or name.startswith("baseline"))
        if reserved:
            raise TaskError(f"The task names {reserved} are used for metrics of the whole run: rename these tasks.")
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


class MultiTaskTrainer(MultiTaskMixin, TaskTrainer):
    """`transformers.Trainer` over a dict of datasets.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets (or a `TaskSet`); rows of text are
    tokenized; `model` may be a name; `peft_config` adds an adapter, as in trl.
    """

    adapter_trainer_class = TaskTrainer

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config: PeftConfig | None = None,
        callbacks=None,
        optimizers=(None, None),
        **kwargs: Any,
    ):
        args = self._checked_args(args, model)
        tasks = as_task_set(train_dataset, eval_dataset)
        # The adapter's first weights are random: seed before they are made.
        set_seed(args.seed)
        if args.label_smoothing_factor > 0 and tasks.label_space is not None:
            raise ConfigurationError("label_smoothing_factor is not defined over label sets that differ by task.")
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                model if isinstance(model, str) else model.config._name_or_path
            )
        if isinstance(model, str):
            space = tasks.label_space
            model = AutoModelForCausalLM.from_pretrained(model) if space is None else load_classifier(model, space)
        check_labels(model, tasks.label_space)
        model = without_adapters_of_earlier_runs(model)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        is_classification = tasks.row_format is RowFormat.CLASSIFICATION
        if data_collator is None:
            data_collator = data_collator_for(
                tasks.row_format, processing_class, labels_are_tokens=not is_classification
            )
        self._row_format, self._tokenizer, self._label_space = tasks.row_format, processing_class, tasks.label_space
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._encode(tasks.table("train")),
            eval_dataset={name: self._encode(rows) for name, rows in tasks.split("validation").items()},
            processing_class=processing_class,
            callbacks=callbacks,
            label_space=tasks.label_space,
            sampling_weights=tasks.sampling_weights,
            **kwargs,
        )
        self._finish_init(tasks, {"data_collator": self.data_collator, **kwargs}, callbacks, optimizers)

    def _encode(self, rows: Dataset) -> Dataset:
        return encode(rows, self._tokenizer, self._row_format, self._label_space, length_limit(self._tokenizer))

    def prepare_rows(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        return {name: self._encode(rows) for name, rows in self._identified(datasets).items()}


class MultiTaskSFTTrainer(MultiTaskMixin, TaskSFTTrainer):
    """`trl.SFTTrainer` over a dict of datasets.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets (or a `TaskSet`).
    """

    adapter_trainer_class = TaskSFTTrainer

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config: PeftConfig | None = None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        formatting_func=None,
        **kwargs: Any,
    ):
        args = self._checked_args(args, model)
        tasks = as_task_set(train_dataset, eval_dataset)
        if tasks.row_format is RowFormat.CLASSIFICATION:
            raise TaskError(
                "Supervised fine-tuning takes prompts and completions, found text and label. Use EnsembleTrainer."
            )
        if tasks.row_format is RowFormat.CHAT and not args.assistant_only_loss:
            logger.warning(
                "Without assistant_only_loss=True every token of a chat is trained on and counts as its answer, "
                "including the user's turns, and the accuracy of whole answers means nothing."
            )
        if args.packing or args.padding_free:
            raise ConfigurationError("Packed rows lose their task: set packing=False and padding_free=False.")
        super().__init__(
            model=model if isinstance(model, str) else without_adapters_of_earlier_runs(model),
            args=args,
            data_collator=data_collator,
            train_dataset=tasks.table("train"),
            eval_dataset=tasks.split("validation"),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            quantization_config=quantization_config,
            formatting_func=formatting_func,
            sampling_weights=tasks.sampling_weights,
            **kwargs,
        )
        self._finish_init(tasks, {"data_collator": data_collator, **kwargs}, callbacks, optimizers)

    def _undo_preparation(self) -> None:
        if isinstance(self.model, PeftModel) and self.args.gradient_checkpointing:
            # SFTTrainer makes the embeddings' outputs require gradients before `Trainer` sees the model.
            self.model.disable_input_require_grads()
            # An empty list is left behind.
            vars(self.model.get_base_model()).pop("_require_grads_hooks", None)

    def adapter_trainer(self, args: SFTConfig, *tables: Any, **kwargs: Any) -> Trainer:
        # The model is loaded and the rows are tokens already.
        args.model_init_kwargs = args.chat_template_path = None
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        return super().adapter_trainer(args, *tables, **kwargs)

    def prepare_rows(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        rows = self._identified(datasets)
        arguments = (self.processing_class, self.args, False, self._formatting_func)
        return {name: self._prepare_dataset(dataset, *arguments, name) for name, dataset in rows.items()}


def load_classifier(name: str, label_space: LabelSpace, **kwargs: Any):
    """A sequence classifier whose outputs are the label space's; `kwargs` go to `from_pretrained`."""
    return AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(label_space),
        id2label=dict(enumerate(label_space.names)),
        label2id={label: i for i, label in enumerate(label_space.names)},
        **kwargs,
    )
