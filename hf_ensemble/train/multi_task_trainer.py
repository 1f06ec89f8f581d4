"""`transformers.Trainer` over a dict of datasets: one table of tokens, and one adapter at its start."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from ..models.inputs import is_encoder_decoder
from ..tasks import META_COLUMNS, RowFormat, TaskSet, data_collator_for, encode, length_limit
from ..tasks.task import make_task
from .inputs.datasets import (
    as_task_set,
    check_labels,
    check_one_label_set,
    is_one_dataset,
    is_text_classification,
    load_model,
    the_one_dataset,
    with_held_out_rows,
)
from .inputs.target_modules import target_modules_named, with_target_modules
from .inputs.used_models import without_adapters_of_earlier_runs
from .multi_task_mixin import MultiTaskMixin
from .task_trainer import TaskTrainer


class MultiTaskTrainer(MultiTaskMixin, TaskTrainer):
    """`transformers.Trainer` over a dict of datasets.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets (or a `TaskSet`); rows of text are
    tokenized; `model` may be a name; `peft_config` adds an adapter, as in trl.
    """

    adapter_trainer_class = TaskTrainer

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        model_init=None,
        peft_config: PeftConfig | None = None,
        callbacks=None,
        optimizers=(None, None),
        **kwargs: Any,
    ):
        is_one = is_one_dataset(train_dataset)
        if is_one:
            train_dataset, eval_dataset = the_one_dataset(train_dataset, eval_dataset)
        takes_tokens = is_one and not is_text_classification(train_dataset)
        if model is None and model_init is not None and not (takes_tokens and peft_config is None):
            set_seed(getattr(args, "seed", self.config_class.seed))
            model, model_init = model_init(), None
        has_adapter = not is_one and self._has_adapter(model, peft_config)
        args = self._own_args(args, model, has_adapter, is_made_later=model_init is not None)
        given = {"args": args, "data_collator": data_collator, "callbacks": callbacks, **kwargs}
        # The adapter's first weights are random: seed before they are made.
        set_seed(args.seed)
        if takes_tokens:
            given |= {"processing_class": processing_class, "model_init": model_init, "optimizers": optimizers}
            given |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            model = model if peft_config is None else get_peft_model(model, peft_config)
            self._train_directly(None, model=model, has_tasks=False, **given)
            return
        tasks = as_task_set({"data": train_dataset} if is_one else train_dataset, None if is_one else eval_dataset)
        if args.label_smoothing_factor > 0 and not is_one:
            check_one_label_set(tasks)
        if has_adapter:
            tasks = with_held_out_rows(tasks, args.validation_fraction, args.seed)
            checked = {"model": model, "processing_class": processing_class, "peft_config": peft_config}
            self._check_arguments(tasks, args, given | checked | {"optimizers": optimizers})
        model, processing_class = _text_model(model, processing_class, tasks)
        if peft_config is not None:
            peft_config = with_target_modules(peft_config, model)
            with target_modules_named(peft_config, model):
                model = get_peft_model(model, peft_config)
        if data_collator is None:
            is_classification = tasks.row_format is RowFormat.CLASSIFICATION
            given["data_collator"] = data_collator_for(
                tasks.row_format, processing_class, labels_are_tokens=not is_classification
            )
        self._row_format, self._tokenizer, self._label_space = tasks.row_format, processing_class, tasks.label_space
        self._is_encoder_decoder = is_encoder_decoder(model)
        given |= {"model": model, "processing_class": processing_class}
        if is_one:
            rows = self._rows_of_one(tasks, eval_dataset)
            self._train_directly(None, has_tasks=False, optimizers=optimizers, **rows, **given)
        elif not has_adapter:
            self._train_directly(tasks, optimizers=optimizers, **self._rows_of(tasks), **given)
        else:
            super().__init__(**self._rows_of(tasks), **given)
            own = {"data_collator": self.data_collator, **kwargs}
            self._finish_init(tasks, own, callbacks, peft_config is not None)

    def _encode(self, rows: Dataset) -> Dataset:
        limit, apart = length_limit(self._tokenizer), self._is_encoder_decoder
        return encode(rows, self._tokenizer, self._row_format, self._label_space, limit, apart)

    def _rows_of(self, tasks: TaskSet) -> dict[str, Any]:
        """The arguments of [`TaskTrainer`] that hold the tasks' rows, and how they are trained on."""
        evaluated = tasks.split("validation") if tasks.has_split("validation") else None
        return {
            "train_dataset": self._encode(tasks.table("train")),
            "eval_dataset": evaluated and {name: self._encode(rows) for name, rows in evaluated.items()},
            "label_space": tasks.label_space,
            "sampling_weights": tasks.sampling_weights,
        }

    def _rows_of_one(self, tasks: TaskSet, eval_dataset: Any) -> dict[str, Any]:
        """The rows of one dataset as tokens and labels, and nothing else."""
        (task,) = tasks.values()

        def encoded(rows: Any) -> Any:
            if isinstance(rows, Mapping):
                return {name: encoded(own) for name, own in rows.items()}
            if rows is None or not is_text_classification(rows):
                return rows
            identified = make_task(task.name, {"train": task.splits["train"], "test": rows}).splits["test"]
            return self._encode(identified).remove_columns(list(META_COLUMNS))

        return {"train_dataset": encoded(task.splits["train"]), "eval_dataset": encoded(eval_dataset)}

    def _token_tables(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        return {name: self._encode(rows) for name, rows in datasets.items()}


def _text_model(
    model: Any, processing_class: PreTrainedTokenizerBase | None, tasks: TaskSet
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model for the tasks' rows, loaded where a name is given, and its tokenizer."""
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(
            model if isinstance(model, str) else model.config._name_or_path
        )
    if isinstance(model, str):
        model = load_model(model, tasks.label_space)
    check_labels(model, tasks.label_space)
    return without_adapters_of_earlier_runs(model), processing_class
