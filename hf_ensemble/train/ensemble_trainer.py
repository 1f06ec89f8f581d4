"""Fine-tune on many datasets: group them, train one adapter per group, serve the weighted ensemble."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from .._files import writing
from ..ensemble import PeftEnsembleModel
from ..errors import ConfigurationError
from ..publish import renew_model_card
from ..runs.boosting import START
from ..runs.systems import BASELINE
from ..select import Grouping
from ..tasks import TaskSet
from .configs import EnsembleConfig, EnsembleSFTConfig
from .credentials import arguments_without_secrets
from .flow_trainer import FlowTrainerMixin
from .flows.boosting.stage import step_name
from .flows.context import FlowContext
from .flows.ensemble_flow import EnsembleFlow
from .inputs.boosting import check_boosted_model, check_boosting_arguments
from .inputs.concurrency import check_concurrency, check_concurrent_model
from .inputs.supported import check_base_model
from .inputs.used_models import check_adapter_names
from .multi_task_sft_trainer import MultiTaskSFTTrainer
from .multi_task_trainer import MultiTaskTrainer
from .tracking import tracked_run


class EnsembleMixin(FlowTrainerMixin[EnsembleFlow]):
    """A trainer whose run captures gradients, groups the tasks, trains one adapter per group and weighs them.

    Attributes:
        ensemble (`PeftEnsembleModel`, *optional*): the ensemble, after [`train`].
        grouping (`Grouping`, *optional*): which tasks each adapter was trained on.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.trains_directly:
            self._check_choice_by_answers()
            check_base_model(self.model)
            check_concurrent_model(self.model, self.args)
            names = {BASELINE, *(f"group_{number}" for number in range(len(self.tasks) + 1))}
            if self.args.boosting_steps:
                check_boosted_model(self.model, self.args)
                names |= {START, *(step_name(number) for number in range(self.args.boosting_steps))}
            check_adapter_names(self.model, names)

    def _check_arguments(self, tasks: TaskSet, args: TrainingArguments, given: Mapping[str, Any]) -> None:
        super()._check_arguments(tasks, args, given)
        args.check_tasks(len(tasks))
        check_concurrency(args)
        check_boosting_arguments(args, given.get("compute_loss_func") is not None, bool(self._streams))

    def _check_choice_by_answers(self) -> None:
        if self.args.ensemble_weights == "answers" and not self.answer_metrics:
            raise ConfigurationError(
                "ensemble_weights='answers' chooses weights by generated answers, and there are no answer_metrics. "
                "Pass answer_metrics=AnswerMetric(...), or leave ensemble_weights out."
            )

    def _run_choices(self) -> dict[str, Any]:
        choices = super()._run_choices()
        if self.args.ensemble_weights == "answers":
            choices["answer_metrics"] = {task: metric.identity() for task, metric in self.answer_metrics.items()}
        return choices

    def _make_flow(self, context: FlowContext) -> EnsembleFlow:
        return EnsembleFlow(context)

    @property
    def ensemble(self) -> PeftEnsembleModel | None:
        return None if self.flow is None else self.flow.ensemble

    @property
    def grouping(self) -> Grouping | None:
        return None if self.flow is None else self.flow.grouping

    def group_tasks(self) -> Grouping:
        """Run the stages up to the groups, for trainings of single groups; [`train`] goes on from there."""
        with self.working():
            self.flow.group()
        return self.grouping

    def train_groups(self) -> None:
        """Run the stages up to the adapters of all groups; [`train`] goes on from there."""
        # A tracker that each training opened would be closed by the first of several at once.
        together = tracked_run(self) if self.args.concurrent_groups != 1 else nullcontext()
        with self.working(), together:
            self.flow.group()
            self.flow.train_groups()

    def _is_trained(self) -> bool:
        return self.ensemble is not None

    def _made_folder(self) -> Path:
        return self.run_directory.ensemble

    def _serve(self) -> None:
        self.model = self.model_wrapped = self.ensemble

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the ensemble with tokenizer, model card and arguments; before [`train`], what the parent trainer saves.

        Args:
            output_dir (`str`, *optional*): the folder; by default `ensemble` in the run's.
        """
        if self.trains_directly or not self._is_trained():
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.run_directory.ensemble)
        if self.args.should_save:
            self.ensemble.save_pretrained(folder)
            with writing(folder):
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                torch.save(arguments_without_secrets(self.args), folder / TRAINING_ARGS_NAME)
            renew_model_card(self.run_directory, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")


class EnsembleTrainer(EnsembleMixin, MultiTaskTrainer):
    """`transformers.Trainer` that fine-tunes on many datasets and ends with an ensemble of adapters.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets; [`train`] captures gradients, groups the
    tasks, trains one adapter per group and one for all, and combines them; [`evaluate`] reports every task, for the
    ensemble and, as `PREFIX_baseline_...`, for the one adapter for all.

    Example:

    ```python
    >>> trainer = EnsembleTrainer(  # doctest: +SKIP
    ...     model="bert-base-uncased",
    ...     args=EnsembleConfig(output_dir="out"),
    ...     train_dataset={"sst2": sst2["train"], "cola": cola["train"]},
    ...     eval_dataset={"sst2": sst2["validation"], "cola": cola["validation"]},
    ...     peft_config=LoraConfig(task_type="SEQ_CLS"),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    config_class = EnsembleConfig


class EnsembleSFTTrainer(EnsembleMixin, MultiTaskSFTTrainer):
    """`trl.SFTTrainer` that fine-tunes on many datasets and ends with an ensemble of adapters.

    Changes: see [`EnsembleTrainer`].

    Example:

    ```python
    >>> trainer = EnsembleSFTTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=EnsembleSFTConfig(output_dir="out"),
    ...     train_dataset={"gsm8k": gsm8k, "boolq": boolq},
    ...     eval_dataset={"gsm8k": gsm8k_eval, "boolq": boolq_eval},
    ...     peft_config=LoraConfig(task_type="CAUSAL_LM"),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    config_class = EnsembleSFTConfig
