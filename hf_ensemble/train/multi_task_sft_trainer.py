"""`trl.SFTTrainer` over a dict of datasets: one table of tokens, and one adapter at its start."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from transformers import Trainer
from trl import SFTConfig, pack_dataset
from trl.data_utils import is_conversational, is_conversational_from_value
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..errors import TaskError
from ..logging import get_logger
from ..tasks import META_COLUMNS, TASK, RowFormat, TaskCollator, TaskSet
from .inputs.datasets import (
    as_task_set,
    check_template,
    is_one_dataset,
    is_text_classification,
    the_one_dataset,
    with_held_out_rows,
)
from .inputs.target_modules import target_modules_named, with_target_modules
from .inputs.used_models import without_adapters_of_earlier_runs
from .multi_task_mixin import MultiTaskMixin
from .task_trainer import TaskSFTTrainer

logger = get_logger(__name__)

_TOKENS = ["input_ids", "labels"]


class MultiTaskSFTTrainer(MultiTaskMixin, TaskSFTTrainer):
    """`trl.SFTTrainer` over a dict of datasets.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets (or a `TaskSet`), whose rows may have
    different formats.
    """

    adapter_trainer_class = TaskSFTTrainer
    _shown_rows: Dataset | None = None

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
        is_one = is_one_dataset(train_dataset)
        is_direct = is_one or not self._has_adapter(model, peft_config)
        if args is not None or not is_one:
            args = self._own_args(args, model, of_adapters=not is_direct)
        given = {
            "args": args,
            "data_collator": data_collator,
            "processing_class": processing_class,
            "peft_config": peft_config,
            "callbacks": callbacks,
            "quantization_config": quantization_config,
            "formatting_func": formatting_func,
            **kwargs,
        }
        if is_one:
            train_dataset, eval_dataset = the_one_dataset(train_dataset, eval_dataset)
            rows = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            self._train_directly(None, model=model, optimizers=optimizers, has_tasks=False, **rows, **given)
            return
        # Without an adapter, evaluation rows are the parent's business: any names, or none.
        tasks = as_task_set(train_dataset, None if is_direct else eval_dataset, RowFormat.SFT)
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
        # The parent's constructor looks at the first row, and prepares what it is given; see _prepare_dataset.
        self._shown_rows = next(iter(tasks.values())).splits["train"]
        given |= {"train_dataset": self._shown_rows, "sampling_weights": tasks.sampling_weights}
        if is_direct:
            logger.warning(
                "There is no adapter: one model is trained on all %d datasets together. Pass "
                "peft_config=LoraConfig(...) to train adapters on those that belong together.",
                len(tasks),
            )
            self._train_directly(tasks, model=model, optimizers=optimizers, eval_dataset=eval_dataset, **given)
            self._shown_rows = None
            self.train_dataset = self._table(tasks, "train")
            if args.packing:
                self.train_dataset = self._packed(self.train_dataset, args)
            return
        tasks = with_held_out_rows(tasks, args.validation_fraction, args.seed)
        self._check_arguments(tasks, args, given | {"model": model, "optimizers": optimizers})
        if not isinstance(model, str):
            model = without_adapters_of_earlier_runs(model)
        given["peft_config"] = with_target_modules(peft_config, model)
        with target_modules_named(peft_config, model):
            super().__init__(model=model, eval_dataset={"shown": self._shown_rows}, **given)
        self._shown_rows = None
        self.train_dataset = self._table(tasks, "train")
        self.eval_dataset = {name: self._tokens(name, rows) for name, rows in tasks.split("validation").items()}
        own = {"data_collator": data_collator, **kwargs}
        self._finish_init(tasks, own, callbacks, peft_config is not None)

    def _undo_preparation(self) -> None:
        if isinstance(self.model, PeftModel) and self.args.gradient_checkpointing:
            # SFTTrainer makes the embeddings' outputs require gradients before `Trainer` sees the model.
            self.model.disable_input_require_grads()
            # An empty list is left behind.
            vars(self.model.get_base_model()).pop("_require_grads_hooks", None)

    def _prepare_dataset(self, dataset, *args: Any, **kwargs: Any):
        # What the constructor was shown stands for all tasks; each is prepared on its own after it.
        return dataset if dataset is self._shown_rows else super()._prepare_dataset(dataset, *args, **kwargs)

    def _tokens(self, name: str, rows: Dataset) -> Dataset:
        """A task's rows as tokens and labels, as trl prepares them, but never packed."""
        if self._skip_prepare_dataset:
            if "labels" in rows.column_names or "input_ids" not in rows.column_names:
                return rows
            return rows.add_column("labels", rows["input_ids"][:])
        first = rows[0]
        if self.args.assistant_only_loss and not (is_conversational(first) or is_conversational_from_value(first)):
            raise TaskError(
                f"Task {name!r}: assistant_only_loss=True needs chats, found the columns {rows.column_names}. Set "
                "assistant_only_loss=False, or leave the task out."
            )
        if self.args.completion_only_loss is None:
            # trl decides by the columns; here, those of each task.
            self.completion_only_loss = {"prompt", "completion"} <= set(rows.column_names)
        if "input_ids" not in rows.column_names:
            check_template(rows, self.processing_class)
        tokens = self._prepare_dataset(rows, self.processing_class, self.args, False, self._formatting_func, name)
        keeps_columns = not self.args.remove_unused_columns
        return tokens if keeps_columns else tokens.select_columns([*_TOKENS, *META_COLUMNS])

    def _table(self, tasks: TaskSet, split: str) -> Dataset:
        return concatenate_datasets([self._tokens(name, rows) for name, rows in tasks.split(split).items()])

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
        pad_token_id = self.data_collator.collator.pad_token_id
        return TaskCollator(
            DataCollatorForLanguageModeling(pad_token_id, pad_to_multiple_of=self.args.pad_to_multiple_of)
        )

    def num_drawn_rows(self) -> Mapping[str, int]:
        if not self.args.packing:
            return super().num_drawn_rows()
        return Counter(self._packed(self.train_dataset, self.args)[TASK])

    def adapter_trainer(
        self, args: SFTConfig, train_dataset: Dataset, eval_dataset: Mapping[str, Dataset], *weights: Any, **kwargs: Any
    ) -> Trainer:
        # The model is loaded and the rows are tokens already.
        args.model_init_kwargs = args.chat_template_path = None
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        if args.packing:
            train_dataset = self._packed(train_dataset, args)
        if args.packing if args.eval_packing is None else args.eval_packing:
            eval_dataset = {name: self._packed(rows, args) for name, rows in eval_dataset.items()}
        return super().adapter_trainer(args, train_dataset, eval_dataset, *weights, **kwargs)

    def _token_tables(self, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
        return {name: self._tokens(name, rows) for name, rows in datasets.items()}
