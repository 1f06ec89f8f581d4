"""`trl.SFTTrainer` over a dict of datasets: one table of tokens, and one adapter at its start."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from transformers import Trainer
from trl import SFTConfig, pack_dataset
from trl.data_utils import is_conversational, is_conversational_from_value
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..errors import TaskError
from ..logging import get_logger
from ..tasks import META_COLUMNS, TASK, RowFormat, TaskCollator, TaskSet
from ..tasks.columns import column_names
from ..tasks.encoding import joined
from ..tasks.row_checks import image_columns, refuse_images
from ..tasks.sft_rows import SFTRows
from ..tasks.stream_rows import identified_stream
from .inputs.balancing import check_loss_weighting, with_given_weights
from .inputs.classifiers import with_task_type
from .inputs.datasets import (
    as_task_set,
    check_sft_rows,
    check_template,
    is_one_dataset,
    is_text_classification,
    the_one_dataset,
    with_held_out_rows,
)
from .inputs.sharding import without_sharding
from .inputs.streams import balanced, interleaved, read_streams
from .inputs.supported import check_quantization, checked_keywords, refuse_padding_collator
from .inputs.target_modules import target_modules_named, with_target_modules
from .inputs.unions import check_transforms, has_images, skips_preparation, uncut, with_labels
from .inputs.used_models import without_adapters_of_earlier_runs
from .multi_task_mixin import MultiTaskMixin
from .task_trainer import TaskSFTTrainer

logger = get_logger(__name__)

Rows = TypeVar("Rows", Dataset, IterableDataset)

_TOKENS = ["input_ids", "labels"]
# Rows of a stream that are looked at before one model is trained on it.
_CHECKED_ROWS = 20


class MultiTaskSFTTrainer(MultiTaskMixin, TaskSFTTrainer):
    """`trl.SFTTrainer` over a dict of datasets.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets (or a `TaskSet`), whose rows may have
    different formats, and some of which may be streams.
    """

    adapter_trainer_class = TaskSFTTrainer
    _shown_rows: Dataset | None = None
    _has_several: bool = False
    _reads_masks: bool = False
    _reads: SFTRows = SFTRows()
    _packs: Mapping[str, Dataset] = MappingProxyType({})

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_loss_func=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
        quantization_config=None,
        peft_config: PeftConfig | None = None,
        formatting_func=None,
        **kwargs: Any,
    ):
        # The parent's arguments are in its order, since scripts pass them by position.
        kwargs = checked_keywords(kwargs) | {
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        is_one = is_one_dataset(train_dataset)
        is_direct = is_one or not self._has_adapter(model, peft_config)
        if args is not None or not is_one:
            args = self._own_args(args, model, of_adapters=not is_direct, is_parent=is_one)
        check_quantization(quantization_config, args)
        given = {
            "model": model,
            "args": args,
            "data_collator": data_collator,
            "processing_class": processing_class,
            "peft_config": peft_config,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "quantization_config": quantization_config,
            "formatting_func": formatting_func,
            **kwargs,
        }
        if is_one:
            train_dataset, eval_dataset = the_one_dataset(train_dataset, eval_dataset)
            rows = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            self._train_directly(None, has_tasks=False, **rows, **given)
        elif is_direct:
            self._init_union(train_dataset, eval_dataset, given)
        else:
            self._init_run(train_dataset, eval_dataset, given, {"data_collator": data_collator, **kwargs})

    def _init_union(self, train_dataset: Any, eval_dataset: Any, given: dict[str, Any]) -> None:
        """Train one model, as the parent would on the rows of all datasets in one table or stream."""
        args = given["args"]
        check_transforms(train_dataset, args)
        read = read_streams(train_dataset, None, args, min(args.streaming_rows, _CHECKED_ROWS))
        # Evaluation rows are the parent's business: any names, or none.
        evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
        tasks = _sft_tasks(read.train, None)
        args.check_limited_tasks(tasks.names)
        self._reads = SFTRows.of(args, given["formatting_func"])
        check_sft_rows(tasks, self._reads)
        for name, rows in evaluated.items():
            if isinstance(rows, Dataset):
                self._reads.check(name, "validation", rows)
        tasks = balanced(with_given_weights(tasks, args), read.streams)
        logger.warning(
            "There is no adapter: one model is trained on all %d datasets together. Pass "
            "peft_config=LoraConfig(...) to train adapters on those that belong together.",
            len(tasks),
        )
        self.tasks, self._has_several, self._reads_masks = tasks, True, given["data_collator"] is not None
        self._streams = {
            name: identified_stream(tasks[name], stream, self._reads) for name, stream in read.streams.items()
        }
        if self._streams:
            # They change how processes read.
            args = given["args"] = copy.copy(args)
        if has_images(tasks):
            # trl's collator makes tokens of texts and images, batch by batch.
            shown = self._union(args, lambda name, rows: rows)
        elif skips_preparation(args):
            shown = self._union(args, lambda name, rows: with_labels(name, rows, self._reads_masks))
        else:
            shown = self._shown_rows = next(iter(tasks.values())).splits["train"]
        given |= {"train_dataset": shown, "eval_dataset": eval_dataset, "sampling_weights": tasks.sampling_weights}
        evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else ()
        check_loss_weighting(args, tasks, given.get("compute_loss_func"), evaluated, is_sft=True)
        self._train_directly(tasks, **given)
        self._shown_rows = None
        self._draw_from(tasks, lambda: Counter(self.train_dataset[TASK]))

    def _init_run(
        self, train_dataset: Any, eval_dataset: Any, given: dict[str, Any], adapter_trainer_kwargs: dict[str, Any]
    ) -> None:
        """Prepare the rows of a run, in which adapters are trained on some of the tasks each."""
        args, model = given["args"], given["model"]
        check_transforms(train_dataset, args)
        read = read_streams(train_dataset, eval_dataset, args, args.streaming_rows, args.validation_fraction)
        tasks = _sft_tasks(read.train, read.evaluation)
        self._reads = SFTRows.of(args, given["formatting_func"])
        # Before rows are held out, so that errors have the user's own numbers.
        check_sft_rows(tasks, self._reads)
        tasks = with_held_out_rows(tasks, args.validation_fraction, args.seed)
        args.check_limited_tasks(tasks.names)
        tasks = balanced(with_given_weights(tasks, args), read.streams)
        for name, task in tasks.items():
            for split, rows in task.splits.items():
                refuse_images(name, split, rows)
        self._has_several, self._reads_masks = True, given["data_collator"] is not None
        self._streams = read.streams
        # The parent's constructor looks at the first row, and prepares what it is given; see _prepare_dataset.
        self._shown_rows = next(iter(tasks.values())).splits["train"]
        given |= {"train_dataset": self._shown_rows, "sampling_weights": tasks.sampling_weights}
        self._check_arguments(tasks, args, given)
        given["args"], self._sharding = without_sharding(
            args, model, given["peft_config"], given["quantization_config"]
        )
        # Instances of optimizers are refused.
        del given["optimizers"]
        peft_config = given["peft_config"]
        given["model"] = model = model if isinstance(model, str) else without_adapters_of_earlier_runs(model)
        given["peft_config"] = with_target_modules(with_task_type(peft_config, model), model)
        with target_modules_named(peft_config, model):
            super().__init__(eval_dataset={"shown": self._shown_rows}, **given)
        self._shown_rows = None
        whole = {name: self._tokens(name, rows, uncut(args)) for name, rows in tasks.split("train").items()}
        self.train_dataset = joined([self._prepared(name, rows) for name, rows in whole.items()])
        if args.packing:
            self._packs = {name: self._prepared(name, rows, packing=True) for name, rows in whole.items()}
        self.eval_dataset = {name: self._tokens(name, rows) for name, rows in tasks.split("validation").items()}
        self._streams = {
            name: self._tokens(name, identified_stream(tasks[name], stream, self._reads), uncut(args))
            for name, stream in read.streams.items()
        }
        self._streams = {name: self._prepared(name, rows, args.packing) for name, rows in self._streams.items()}
        self._finish_init(tasks, adapter_trainer_kwargs, given["callbacks"], given["peft_config"] is not None)

    def _undo_preparation(self) -> None:
        if isinstance(self.model, PeftModel) and self.args.gradient_checkpointing:
            # SFTTrainer makes the embeddings' outputs require gradients before `Trainer` sees the model.
            self.model.disable_input_require_grads()
            # An empty list is left behind.
            vars(self.model.get_base_model()).pop("_require_grads_hooks", None)

    def _prepare_dataset(
        self,
        dataset: Rows,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[[dict], str] | None,
        dataset_name: str,
    ) -> Rows:
        # What the constructor was shown stands for all tasks. A run prepares each of them after it; a single model is
        # trained on all of them, which are cut, packed and shuffled together.
        if dataset is self._shown_rows:
            if not self.trains_directly:
                return dataset
            self._shown_rows = None
            dataset = self._union(args, lambda name, rows: self._tokens(name, rows, uncut(args), processing_class))
            if packing and not self._streams and self._needs_tasks(args):
                return self._packed(dataset, args)
        elif self._has_several and args.completion_only_loss is None:
            # trl decides by the columns of the training rows; here, each dataset has its own.
            self.completion_only_loss = {"prompt", "completion"} <= set(column_names(dataset))
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _needs_tasks(self, args: SFTConfig) -> bool:
        """Whether rows are drawn or weighed by their task, which a pack of several tasks does not have."""
        is_drawn = args.task_sampling != "proportional" or args.sample_with_replacement
        return is_drawn or args.task_loss_weighting != "tokens" or len(set(self.sampling_weights.values())) > 1

    def _union(self, args: SFTConfig, prepare: Callable[[str, Rows], Rows]) -> Rows:
        """The rows of all tasks in one table, or in one stream where some are streamed."""
        tables = joined([prepare(name, rows) for name, rows in self.tasks.split("train").items()])
        if not self._streams:
            return tables
        streams = {name: prepare(name, stream) for name, stream in self._streams.items()}
        return interleaved(streams, tables, self.tasks.sampling_weights, args)

    def _tokens(self, name: str, rows: Rows, args: SFTConfig | None = None, processing_class: Any = None) -> Rows:
        """A task's rows as tokens and labels, as trl prepares them, but never packed."""
        args, processing_class = args or self.args, processing_class or self.processing_class
        if skips_preparation(args):
            return with_labels(name, rows, self._reads_masks)
        columns, first = column_names(rows), next(iter(rows))
        if args.assistant_only_loss and not (is_conversational(first) or is_conversational_from_value(first)):
            raise TaskError(
                f"Task {name!r}: assistant_only_loss=True needs chats, found the columns {columns}. Set "
                "assistant_only_loss=False, or leave the task out."
            )
        if isinstance(rows, Dataset) and "input_ids" not in columns:
            check_template(rows, processing_class)
        tokens = self._prepare_dataset(rows, processing_class, args, False, self._formatting_func, name)
        return tokens.select_columns([*_TOKENS, *META_COLUMNS]) if args.remove_unused_columns else tokens

    def _prepared(self, name: str, rows: Rows, packing: bool = False) -> Rows:
        """A task's whole rows of tokens cut, or packed, as trl does it; a packed row has a task and no example."""
        if skips_preparation(self.args):
            return rows
        rows = self._prepare_dataset(rows, self.processing_class, self.args, packing, None, name)
        return rows.map(_with_task, fn_kwargs={"name": name}) if packing else rows

    def _packed(self, rows: Dataset, args: SFTConfig) -> Dataset:
        """Rows packed as trl packs them, each task's on its own, so that a packed row has a task."""
        parts = []
        for task in rows.unique(TASK):
            own = rows.select([i for i, other in enumerate(rows[TASK]) if other == task]).select_columns(_TOKENS)
            if args.shuffle_dataset:
                own = own.shuffle(seed=args.seed)
            own = pack_dataset(own, args.max_length, args.packing_strategy)
            parts.append(own.add_column(TASK, [task] * len(own)))
        return concatenate_datasets(parts)

    @property
    def row_collator(self) -> TaskCollator:
        # Padding-free batches have lost which token belongs to which row.
        if not self.padding_free:
            return self.data_collator
        if self._has_another_collator():
            refuse_padding_collator(self.data_collator.collator)
        pad_token_id = self.data_collator.collator.pad_token_id
        return TaskCollator(
            DataCollatorForLanguageModeling(pad_token_id, pad_to_multiple_of=self.args.pad_to_multiple_of)
        )

    def num_drawn_rows(self) -> Mapping[str, int]:
        if not self.args.packing:
            return super().num_drawn_rows()
        return {name: len(rows) for name, rows in self._packs.items()}

    def adapter_trainer(
        self, args: SFTConfig, train_dataset: Dataset, eval_dataset: Mapping[str, Dataset], *weights: Any, **kwargs: Any
    ) -> Trainer:
        # The model is loaded and the rows are tokens already.
        args.model_init_kwargs = args.chat_template_path = None
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        if args.packing:
            train_dataset = joined([self._packs[name] for name in train_dataset.unique(TASK)])
        if args.packing if args.eval_packing is None else args.eval_packing:
            eval_dataset = {name: self._packed(rows, args) for name, rows in eval_dataset.items()}
        return super().adapter_trainer(args, train_dataset, eval_dataset, *weights, **kwargs)

    def _direct_rows(self, given: Any, needs_labels: bool = True) -> Any:
        if not self._has_several:
            return given
        if isinstance(given, Mapping):
            return {name: self._direct_table(rows, name, needs_labels) for name, rows in given.items()}
        return self._direct_table(given, "eval", needs_labels)

    def _direct_table(self, rows: Any, name: str, needs_labels: bool) -> Any:
        """Rows that the parent evaluates as they are, once they are checked, and predicts as tokens only."""
        if not isinstance(rows, Dataset) or "input_ids" in rows.column_names or image_columns(rows.column_names):
            return rows
        self._reads.check(name, "test", rows)
        if needs_labels or skips_preparation(self.args):
            return rows
        return self._prepare_dataset(rows, self.processing_class, self.args, False, self._formatting_func, name)

    def _token_tables(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        for name, rows in datasets.items():
            self._reads.check(name, "test", rows)
        return {name: self._tokens(name, rows) for name, rows in datasets.items()}


def _sft_tasks(train_dataset: Any, eval_dataset: Any) -> TaskSet:
    tasks = as_task_set(train_dataset, eval_dataset, RowFormat.SFT)
    if tasks.row_format is RowFormat.CLASSIFICATION:
        raise TaskError(
            "Supervised fine-tuning takes prompts and completions, found text and label. Use EnsembleTrainer."
        )
    labelled = [name for name, task in tasks.items() if is_text_classification(task.splits["train"])]
    if labelled:
        logger.warning(
            "The tasks %s have a text and a label: SFTTrainer learns the text, and the label is not used. For text "
            "classification use EnsembleTrainer or SelectionTrainer.",
            labelled,
        )
    return tasks


def _with_task(row: Mapping[str, Any], name: str) -> dict[str, str]:
    return {TASK: name}
