"""`transformers.Trainer` over a dict of datasets: one table of tokens, and one adapter at its start."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from ..models.inputs import is_encoder_decoder
from ..tasks import META_COLUMNS, RowFormat, Task, TaskSet, data_collator_for, encode, length_limit
from ..tasks.columns import column_names
from ..tasks.encoding import joined
from ..tasks.stream_rows import identified_stream
from .configs import ClassifierArguments
from .inputs.balancing import check_loss_weighting, with_given_weights
from .inputs.classifiers import (
    adapter_for_head,
    check_labels,
    load_model,
    made_model,
    tokenizer_of,
    warn_of_random_head,
    with_task_type,
)
from .inputs.datasets import (
    as_task_set,
    check_one_label_set,
    is_one_dataset,
    is_text_classification,
    the_one_dataset,
    with_held_out_rows,
)
from .inputs.evaluation_rows import positions_by_task, token_tables, tokens_of_tasks
from .inputs.sharding import without_sharding
from .inputs.streams import balanced, interleaved, read_streams
from .inputs.supported import check_collator, check_has_no_adapter, checked_keywords
from .inputs.target_modules import target_modules_named, with_target_modules
from .inputs.unions import check_transforms, is_left_to_parent
from .inputs.used_models import without_adapters_of_earlier_runs
from .multi_task_mixin import MultiTaskMixin
from .task_trainer import TaskTrainer

Rows = TypeVar("Rows", Dataset, IterableDataset)


class MultiTaskTrainer(MultiTaskMixin, TaskTrainer):
    """`transformers.Trainer` over a dict of datasets.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets (or a `TaskSet`), some of which may be
    streams; rows of text are tokenized; `model` may be a name; `peft_config` adds an adapter, as in trl.
    """

    adapter_trainer_class = TaskTrainer
    # Of rows that this trainer makes tokens of; `None` where its one dataset is tokens already.
    _row_format: RowFormat | None = None
    _one: Task | None = None

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        model_init=None,
        compute_loss_func=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        # The parent's arguments are in its order, since scripts pass them by position.
        kwargs |= {
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        is_one = is_one_dataset(train_dataset)
        if is_one:
            train_dataset, eval_dataset = the_one_dataset(train_dataset, eval_dataset)
        reads_rows = not isinstance(model, str) and is_left_to_parent(train_dataset, data_collator, args)
        takes_tokens = is_one and (reads_rows or not is_text_classification(train_dataset))
        if model is None and model_init is not None and not (takes_tokens and peft_config is None):
            set_seed(getattr(args, "seed", self.config_class.seed))
            model, model_init = made_model(model_init), None
        has_adapter = not is_one and self._has_adapter(model, peft_config)
        args = self._own_args(args, model, has_adapter, is_one, is_made_later=model_init is not None)
        given = {"args": args, "data_collator": data_collator, "callbacks": callbacks, **checked_keywords(kwargs)}
        # The adapter's first weights are random: seed before they are made.
        set_seed(args.seed)
        if takes_tokens:
            given |= {"processing_class": processing_class, "model_init": model_init, "optimizers": optimizers}
            given |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            model = model if peft_config is None else _adapted(model, peft_config)
            self._train_directly(None, model=model, has_tasks=False, **given)
            return
        named = {"data": train_dataset} if is_one else train_dataset
        check_transforms(named, args)
        held_out = args.validation_fraction if has_adapter else None
        read = read_streams(named, None if is_one else eval_dataset, args, args.streaming_rows, held_out)
        tasks, self._streams = as_task_set(read.train, read.evaluation), read.streams
        if not is_one:
            args.check_limited_tasks(tasks.names)
            tasks = with_given_weights(tasks, args)
        if args.label_smoothing_factor > 0 and not is_one:
            check_one_label_set(tasks)
        if has_adapter:
            tasks = with_held_out_rows(tasks, args.validation_fraction, args.seed)
        tasks = tasks if is_one else balanced(tasks, read.streams)
        if has_adapter:
            checked = {"model": model, "processing_class": processing_class, "peft_config": peft_config}
            self._check_arguments(tasks, args, given | checked | {"optimizers": optimizers})
            given["args"], self._sharding = without_sharding(args, model, peft_config)
        elif not is_one:
            evaluated = [name for name, task in tasks.items() if "validation" in task.splits]
            check_loss_weighting(args, tasks, compute_loss_func, evaluated, is_sft=False)
        is_name = isinstance(model, str)
        needs_tokenizer = tasks.row_format is not RowFormat.TOKENIZED or data_collator is None
        model, processing_class = _text_model(model, processing_class, tasks, args, needs_tokenizer)
        if peft_config is not None:
            peft_config = adapter_for_head(peft_config, model) if is_name else peft_config
            peft_config = with_target_modules(with_task_type(peft_config, model), model)
            with target_modules_named(peft_config, model):
                model = get_peft_model(model, peft_config)
        if data_collator is None:
            are_tokens = not tasks.labels_are_classes and not tasks.is_multi_label
            given["data_collator"] = data_collator_for(tasks.row_format, processing_class, labels_are_tokens=are_tokens)
        self._row_format, self._tokenizer, self._label_space = tasks.row_format, processing_class, tasks.label_space
        self._is_encoder_decoder = is_encoder_decoder(model)
        self._streams = {
            name: self._encode(identified_stream(tasks[name], stream)) for name, stream in read.streams.items()
        }
        given |= {"model": model, "processing_class": processing_class}
        if is_one:
            (self._one,) = tasks.values()
            rows = self._rows_of_one(eval_dataset)
            self._train_directly(None, has_tasks=False, optimizers=optimizers, **rows, **given)
        elif not has_adapter:
            rows = self._rows_of(tasks)
            if self._streams:
                given["args"] = args = copy.copy(args)
                rows["train_dataset"] = interleaved(self._streams, rows["train_dataset"], tasks.sampling_weights, args)
            self._train_directly(tasks, optimizers=optimizers, **rows, **given)
            check_collator(self)
            self._draw_from(tasks, self.num_drawn_rows)
        else:
            super().__init__(**self._rows_of(tasks), **given)
            own = {"data_collator": self.data_collator, **kwargs}
            self._finish_init(tasks, own, callbacks, peft_config is not None)

    def _encode(self, rows: Rows) -> Rows:
        if self._row_format is RowFormat.TOKENIZED:
            return rows
        limit, apart = length_limit(self._tokenizer), self._is_encoder_decoder
        return encode(rows, self._tokenizer, self._row_format, self._label_space, limit, apart)

    def _rows_of(self, tasks: TaskSet) -> dict[str, Any]:
        """The arguments of [`TaskTrainer`] that hold the tasks' rows, and how they are trained on."""
        evaluated = {name: task.splits["validation"] for name, task in tasks.items() if "validation" in task.splits}
        return {
            "train_dataset": joined([self._encode(rows) for rows in tasks.split("train").values()]),
            "eval_dataset": {name: self._encode(rows) for name, rows in evaluated.items()} or None,
            "label_space": tasks.label_space,
            "sampling_weights": tasks.sampling_weights,
        }

    def _rows_of_one(self, eval_dataset: Any) -> dict[str, Any]:
        """The rows of one dataset as tokens and labels, and nothing else."""
        train = self._streams.get(self._one.name)
        train = self._encode(self._one.splits["train"]) if train is None else train
        return {
            "train_dataset": train.remove_columns(list(META_COLUMNS)),
            "eval_dataset": self._direct_rows(eval_dataset),
        }

    def _direct_rows(self, given: Any, needs_labels: bool = True) -> Any:
        if isinstance(given, Mapping):
            return {name: self._direct_table(rows, name, needs_labels) for name, rows in given.items()}
        return self._direct_table(given, None, needs_labels)

    def _direct_table(self, rows: Any, name: str | None, needs_labels: bool) -> Any:
        """One table or stream as tokens; what the parent takes as it is."""
        if self._row_format is None or not isinstance(rows, Dataset | IterableDataset | list) or not rows:
            return rows
        columns = list(rows[0]) if isinstance(rows, list) else column_names(rows)
        is_stream = isinstance(rows, IterableDataset)
        if "input_ids" in columns:
            is_plain = isinstance(rows, Dataset) and not set(META_COLUMNS) <= set(columns)
            is_classified = self._one is None and self._label_space is not None
            return tokens_of_tasks(rows, name, self.tasks, needs_labels) if is_plain and is_classified else rows
        if self._one is not None and is_stream:
            return self._encode(identified_stream(self._one, rows)).remove_columns(list(META_COLUMNS))
        if self._one is not None:
            own = token_tables({self._one.name: rows}, self._known_tasks(), self._prepared, needs_labels)
            return own[self._one.name].remove_columns(list(META_COLUMNS))
        tables = token_tables(rows if name is None else {name: rows}, self.tasks, self._prepared, needs_labels)
        if not all("labels" in table.column_names for table in tables.values()):
            tables = {task: table.select_columns(_without_labels(table)) for task, table in tables.items()}
        positions = positions_by_task(rows) if name is None else None
        table = joined(tables.values())
        return table if positions is None else table.select(positions)

    def _known_tasks(self) -> TaskSet:
        return super()._known_tasks() if self._one is None else TaskSet([self._one])

    def _prepared(self, datasets: Mapping[str, Any]) -> dict[str, Dataset]:
        """Raw rows of known tasks as the constructor makes tokens of them."""
        return self._token_tables(self._identified(datasets))

    def _token_tables(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        return {name: self._encode(rows) for name, rows in datasets.items()}


def _without_labels(table: Dataset) -> list[str]:
    return [column for column in table.column_names if column != "labels"]


def _adapted(model: nn.Module, peft_config: PeftConfig) -> nn.Module:
    check_has_no_adapter(model, peft_config)
    return get_peft_model(model, peft_config)


def _text_model(
    model: Any,
    processing_class: PreTrainedTokenizerBase | None,
    tasks: TaskSet,
    args: ClassifierArguments,
    needs_tokenizer: bool,
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The model for the tasks' rows, loaded where a name is given, and its tokenizer."""
    loading = dict(args.model_init_kwargs or {})
    if processing_class is None:
        processing_class = tokenizer_of(model, loading, needs_tokenizer)
    if isinstance(model, str):
        model = load_model(model, tasks, processing_class, args.head, loading)
    elif tasks.label_space is not None:
        warn_of_random_head(model)
    check_labels(model, tasks)
    return without_adapters_of_earlier_runs(model), processing_class
