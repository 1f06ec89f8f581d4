"""Fine-tune for one target: choose the auxiliary datasets that help it, then train once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigurationError
from ..select import Selection
from ..select.searches import checked_subset_size
from ..tasks import TaskSet
from .configs import SelectionConfig, SelectionSFTConfig
from .flow_trainer import FlowTrainerMixin
from .flows.context import FlowContext
from .flows.selection_flow import SelectionFlow
from .multi_task_sft_trainer import MultiTaskSFTTrainer
from .multi_task_trainer import MultiTaskTrainer


class SelectionMixin(FlowTrainerMixin[SelectionFlow]):
    """A trainer whose run captures gradients, selects auxiliary tasks for a target, and trains one adapter on them.

    After [`train`] the final adapter is active in the model.

    Args:
        target (`str`, *optional*): the task to do well on; not needed with a single dataset.

    Attributes:
        selection (`Selection`, *optional*): the tasks that the final adapter was trained on, after [`train`].
    """

    needs_adapter = True

    def __init__(self, *args: Any, target: str | None = None, **kwargs: Any):
        self.target = target
        super().__init__(*args, **kwargs)
        if not self.trains_directly and self.args.selection_metric == "answers":
            self._check_choice_by_answers(target)

    def _check_arguments(self, tasks: TaskSet, args: TrainingArguments, given: Mapping[str, Any]) -> None:
        super()._check_arguments(tasks, args, given)
        if self.target not in tasks.names:
            raise ConfigurationError(f"Unknown target {self.target!r}; the tasks are {list(tasks)}.")
        args.check_tasks(len(tasks))
        if args.selection_method == "exhaustive":
            checked_subset_size(len(tasks) - 1, args.max_auxiliary)

    def _check_choice_by_answers(self, target: str) -> None:
        if target not in self.answer_metrics:
            raise ConfigurationError(
                f"selection_metric='answers' chooses by the target's answers, and answer_metrics has no entry for "
                f"{target!r}. Pass answer_metrics=AnswerMetric(...)."
            )
        if self.args.projection_dim is not None:
            raise ConfigurationError(
                "selection_metric='answers' puts predicted parameters into the model, which only exact gradients give; "
                f"found projection_dim={self.args.projection_dim}. Set projection_dim=None, or another metric."
            )

    def _make_flow(self, context: FlowContext) -> SelectionFlow:
        return SelectionFlow(context, self.target)

    def _run_choices(self) -> dict[str, Any]:
        choices = {**super()._run_choices(), "target": self.target}
        if self.args.selection_metric == "answers":
            choices["answer_metric"] = self.answer_metrics[self.target].identity()
        return choices

    @property
    def selection(self) -> Selection | None:
        return None if self.flow is None else self.flow.selection

    def _is_trained(self) -> bool:
        return self.selection is not None

    def _made_folder(self) -> Path:
        return self.run_directory.adapter


class SelectionTrainer(SelectionMixin, MultiTaskTrainer):
    """`transformers.Trainer` that fine-tunes for one target on the datasets that help it.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets, `target` names one of them; [`train`]
    captures gradients, selects the auxiliary tasks and trains the adapter; [`evaluate`] reports every task, and the
    target also as `PREFIX_loss` and `PREFIX_accuracy`.
    """

    config_class = SelectionConfig


class SelectionSFTTrainer(SelectionMixin, MultiTaskSFTTrainer):
    """`trl.SFTTrainer` that fine-tunes for one target on the datasets that help it.

    Changes: see [`SelectionTrainer`].

    Example:

    ```python
    >>> trainer = SelectionSFTTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SelectionSFTConfig(output_dir="out"),
    ...     train_dataset={"gsm8k": gsm8k, "boolq": boolq},
    ...     eval_dataset={"gsm8k": gsm8k_eval, "boolq": boolq_eval},
    ...     peft_config=LoraConfig(task_type="CAUSAL_LM"),
    ...     target="gsm8k",
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    config_class = SelectionSFTConfig
