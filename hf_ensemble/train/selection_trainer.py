"""Fine-tune for one target: choose the auxiliary datasets that help it, then train once."""

from typing import Any

from transformers.trainer_utils import TrainOutput

from ..errors import ConfigurationError
from ..select import Selection
from ..store import GradientStore
from .arguments import SelectionConfig, SelectionSFTConfig
from .multi_task_trainer import MultiTaskSFTTrainer, MultiTaskTrainer
from .stages import StagesMixin

META = "meta"


class SelectionMixin(StagesMixin):
    """The stages of a selection run: optional meta-initialization, capture, select, one final fine-tuning.

    Args:
        target (`str`): the task to do well on.
    """

    selection: Selection | None = None

    def __init__(self, *args: Any, target: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if target not in self.tasks:
            raise ConfigurationError(f"Unknown target {target!r}; the tasks are {list(self.tasks)}.")
        self.target = target

    def _choices(self) -> dict[str, Any]:
        return {**super()._choices(), "target": self.target}

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        """Choose the tasks, then fine-tune on them; the final adapter is left active in the model and in `adapter/`.

        Returns:
            `TrainOutput`: of the final fine-tuning, with the metrics of [`evaluate`].

        Raises:
            `RunMismatchError`: when `output_dir` holds a run of another configuration.
        """
        if kwargs:
            raise ConfigurationError(f"train() of a selection takes no {sorted(kwargs)}.")
        run = self.open_run()
        if self.args.meta_initialization:
            with run.stage(META):
                self.adapter_training.run(META, self.tasks.names, run.path / META)
            self.adapter_training.start_from(run.path / META)
        store = self.capture()
        self.selection = self._select(store)
        with run.stage("adapter"):
            trained = self.adapter_training.run("adapter", self.selection.weights, run.path / "adapter")
        self.adapter_training.load(run.path / "adapter")
        metrics = self.evaluate()
        return TrainOutput(trained.global_step, trained.training_loss, metrics)

    def _select(self, store: GradientStore) -> Selection:
        file = self.run_directory.path / "selection.json"
        with self.run_directory.stage("select") as todo:
            if not todo:
                return Selection.load(file)
            selector = self.selector(store)
            selection = selector.select(self.target, self.args.selection_method, self.args.max_auxiliary)
            if self.is_world_process_zero():
                selection.save(file)
            self.accelerator.wait_for_everyone()
        return selection

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and accuracy of every task under the final adapter; before [`train`], the plain trainer's evaluation.

        Returns:
            `dict[str, float]`: `PREFIX_TASK_loss` and `PREFIX_TASK_accuracy` of every task, `PREFIX_loss` and
            `PREFIX_accuracy` of the target.
        """
        if self.selection is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        datasets = self.eval_dataset if eval_dataset is None else self.prepare_rows(eval_dataset)
        scores = self.score_adapter(self.run_directory.path / "adapter", datasets, "Evaluating")
        metrics = {
            f"{metric_key_prefix}_{task}_{measure}": score[measure]
            for task, score in scores.items()
            for measure in ("loss", "accuracy")
        }
        if self.target in scores:
            metrics.update({f"{metric_key_prefix}_{m}": scores[self.target][m] for m in ("loss", "accuracy")})
        self.keep_scores(metric_key_prefix, {"selection": scores})
        self.log(dict(metrics))
        return metrics

    def _upload(self, repo_id: str, **kwargs: Any):
        """The final adapter, as `PeftModel.push_to_hub` uploads it; captured gradients stay on this machine."""
        if self.selection is None:
            raise ConfigurationError("There is no adapter yet: call train() first.")
        return self.model.push_to_hub(repo_id, **kwargs)


class SelectionTrainer(SelectionMixin, MultiTaskTrainer):
    """`transformers.Trainer` that fine-tunes for one target on the datasets that help it.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets, `target` names one of them; [`train`]
    captures gradients, selects the auxiliary tasks and fine-tunes once.
    """

    config_class = SelectionConfig


class SelectionSFTTrainer(SelectionMixin, MultiTaskSFTTrainer):
    """`trl.SFTTrainer` that fine-tunes for one target on the datasets that help it.

    Changes: as of [`SelectionTrainer`].

    Example:

    ```python
    >>> trainer = SelectionSFTTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SelectionSFTConfig(output_dir="out"),
    ...     train_dataset={"gsm8k": gsm8k, "boolq": boolq},
    ...     eval_dataset={"gsm8k": gsm8k_eval, "boolq": boolq_eval},
    ...     peft_config=LoraConfig(),
    ...     target="gsm8k",
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    config_class = SelectionSFTConfig
