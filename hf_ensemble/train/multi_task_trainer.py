"""Trainers over a dict of datasets: one table of tokens, and one adapter at its start."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, set_seed
from trl import SFTConfig

from ..errors import ConfigurationError, TaskError
from ..logging import get_logger
from ..models.inputs import is_encoder_decoder
from ..tasks import RowFormat, data_collator_for, encode, length_limit
from .multi_task_mixin import MultiTaskMixin
from .task_trainer import TaskSFTTrainer, TaskTrainer
from .trainer_inputs import as_task_set, check_labels, load_model
from .used_models import without_adapters_of_earlier_runs

logger = get_logger(__name__)


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
            model = load_model(model, tasks.label_space)
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
        self._is_encoder_decoder = is_encoder_decoder(model)
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
        own = {"data_collator": self.data_collator, **kwargs}
        self._finish_init(tasks, own, callbacks, optimizers, peft_config is not None)

    def _encode(self, rows: Dataset) -> Dataset:
        limit, apart = length_limit(self._tokenizer), self._is_encoder_decoder
        return encode(rows, self._tokenizer, self._row_format, self._label_space, limit, apart)

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
        own = {"data_collator": data_collator, **kwargs}
        self._finish_init(tasks, own, callbacks, optimizers, peft_config is not None)

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
