"""Evaluation and prediction over several datasets as one, with the means over the tasks."""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import nested_concat
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, speed_metrics

from .._values import is_number
from ..tasks import IGNORE_INDEX

# Figures of the evaluation loop itself, beside what `compute_metrics` returns.
_OF_THE_LOOP = ("loss", "runtime", "samples_per_second", "steps_per_second")
# `Trainer` builds evaluation loaders with the options of training loaders. They would reorder rows and leave some out,
# and loaders that are kept for their workers are found by names that several datasets share.
_EVALUATION_LOADERS = {
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": False,
    "dataloader_in_order": True,
    "dataloader_persistent_workers": False,
}


class TaskEvaluationMixin:
    """Evaluates a dict of datasets as one evaluation, in the parent's evaluation loop.

    The metrics of each dataset are named as the parent names them, `eval_TASK_loss`. Beside them stand the means over
    the datasets, `eval_loss`, and all of them are one entry of the log and one `on_evaluate`, so that
    `metric_for_best_model` may name any. [`predict`] takes a dict, too.

    Dataloaders of evaluations and predictions have every row, in the dataset's order, and end with their pass, whatever
    is set for those of the training.
    """

    has_tasks: bool
    # Of the tasks that are being evaluated, by the prefix of their metrics.
    _evaluated: dict[str, EvalLoopOutput] | None = None

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        with self._evaluation_loaders():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        with self._evaluation_loaders():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _evaluation_loaders(self) -> Iterator[None]:
        """Arguments under which the parent builds a loader of all rows in their order."""
        given = self.args
        if self.has_tasks:
            self.args = copy.copy(given)
            for name, value in _EVALUATION_LOADERS.items():
                setattr(self.args, name, value)
        try:
            yield
        finally:
            self.args = given

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        if self._evaluated is not None:
            return self._evaluate_task(eval_dataset, ignore_keys, metric_key_prefix)
        tables = self.eval_dataset if eval_dataset is None else eval_dataset
        if not self.has_tasks or not isinstance(tables, dict) or not tables:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._memory_tracker.start()
        start, self._evaluated = time.time(), {}
        try:
            # The parent prepares the rows, and calls this method for each dataset.
            found = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics = found | self._summary(self._evaluated, metric_key_prefix, start)
        finally:
            self._evaluated = None
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _evaluate_task(
        self, eval_dataset: Dataset | str, ignore_keys: list[str] | None, metric_key_prefix: str
    ) -> dict[str, float]:
        """One task of several, without an entry of the log and an event of its own."""
        # Without metrics to compute, no logits are gathered.
        loss_only = True if self.compute_metrics is None else None
        loader = self.get_eval_dataloader(eval_dataset)
        output = self._task_output(loader, "Evaluation", ignore_keys, metric_key_prefix, loss_only)
        output.metrics.update(self._further_metrics(metric_key_prefix))
        self._evaluated[metric_key_prefix] = output
        return output.metrics

    def predict(
        self,
        test_dataset: Dataset | Mapping[str, Dataset],
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        if not self.has_tasks or not isinstance(test_dataset, Mapping):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        self._memory_tracker.start()
        output = self.predict_tasks(test_dataset, ignore_keys, metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        self._memory_tracker.stop_and_update_metrics(output.metrics)
        return output

    def predict_tasks(
        self, tables: Mapping[str, Dataset], ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predictions for the rows of each task, one task's after the other's, without an event."""
        start = time.time()
        outputs = {}
        for name, rows in tables.items():
            loader, prefix = self.get_test_dataloader(rows), f"{metric_key_prefix}_{name}"
            outputs[prefix] = self._task_output(loader, "Prediction", ignore_keys, prefix, None)
        metrics = {key: value for output in outputs.values() for key, value in output.metrics.items()}
        return PredictionOutput(
            predictions=_joined([output.predictions for output in outputs.values()]),
            label_ids=_joined([output.label_ids for output in outputs.values()]),
            metrics=metrics | self._summary(outputs, metric_key_prefix, start),
        )

    def computed_metrics(self, name: str, ignore_keys: list[str] | None = None) -> dict[str, Any]:
        """What `compute_metrics` returns for an evaluation set of the trainer's own, by the names that it gives."""
        output = self._task_output(self.get_eval_dataloader(name), "Evaluation", ignore_keys, "eval", None)
        found = _without_prefix(output.metrics, "eval_")
        return {key: value for key, value in found.items() if key not in _OF_THE_LOOP}

    def _task_output(
        self, loader: DataLoader, description: str, ignore_keys: list[str] | None, prefix: str, loss_only: bool | None
    ) -> EvalLoopOutput:
        """The parent's evaluation loop over one task."""
        start = time.time()
        output = self.evaluation_loop(
            loader,
            description=description,
            prediction_loss_only=loss_only,
            ignore_keys=ignore_keys,
            metric_key_prefix=prefix,
        )
        output.metrics.pop(f"{prefix}_model_preparation_time", None)
        output.metrics.update(self._speed(prefix, start, [output]))
        return output

    def _further_metrics(self, prefix: str) -> dict[str, float]:
        """What `SFTTrainer` would add to the log of an evaluation; taken, so that the next task's are its own."""
        own = getattr(self, "_metrics", {}).get("eval", {})
        found = {f"{prefix}_{key}": sum(values) / len(values) for key, values in own.items() if values}
        own.clear()
        return found

    def _summary(self, outputs: Mapping[str, EvalLoopOutput], prefix: str, start: float) -> dict[str, float]:
        """The means of the tasks' metrics, and the speed of the whole evaluation."""
        by_task = {own: _without_prefix(output.metrics, f"{own}_") for own, output in outputs.items()}
        means = {f"{prefix}_{key}": value for key, value in mean_metrics(by_task).items()}
        return means | self._speed(prefix, start, list(outputs.values()))

    def _speed(self, prefix: str, start: float, outputs: list[EvalLoopOutput]) -> dict[str, float]:
        batch_size = self.args.eval_batch_size * self.args.world_size
        return speed_metrics(
            prefix,
            start,
            num_samples=sum(output.num_samples for output in outputs),
            num_steps=sum(math.ceil(output.num_samples / batch_size) for output in outputs),
        )


def mean_metrics(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each number over the tasks that have it."""
    found: dict[str, list[float]] = {}
    for metrics in by_task.values():
        for name, value in metrics.items():
            if is_number(value):
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _without_prefix(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def _joined(parts: list[Any]) -> Any:
    """Arrays of several tasks as one, padded as the evaluation loop pads; lists of batches one after the other."""
    if any(part is None for part in parts):
        return None
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + part if isinstance(joined, list) else nested_concat(joined, part, padding_index=IGNORE_INDEX)
    return joined
