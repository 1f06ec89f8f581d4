"""Evaluation of a training on several tasks: figures of each task, and their means."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import EarlyStoppingCallback

# Of the time that an evaluation takes: its sum over the tasks, and rates over that time.
_RUNTIME = "runtime"
_RATES = ("samples_per_second", "steps_per_second")


class TaskEvaluationMixin:
    """Evaluates a dict of datasets as `Trainer` does, and adds `eval_loss` and every other metric as means over them.

    The means make one metric of the evaluations of a training, which `metric_for_best_model` may name. They are logged
    after the datasets' own metrics, and `on_evaluate` is called once more, with all metrics. Early stopping counts
    whole evaluations. Over a single dataset a trainer stays as its parent is.
    """

    has_tasks: bool

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not self.has_tasks or not isinstance(datasets, dict) or not datasets:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        by_name = {}
        with self._without_early_stopping():
            for name, rows in datasets.items():
                prefix = f"{metric_key_prefix}_{name}"
                # As in `Trainer`: through the user's own `evaluate`, and a dataset of the trainer's by its name.
                found = self.evaluate(
                    eval_dataset=name if eval_dataset is None else rows,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=prefix,
                )
                by_name[name] = _without_prefix(found, prefix, metric_key_prefix)
        metrics = {
            f"{metric_key_prefix}_{name}_{key}": value for name, own in by_name.items() for key, value in own.items()
        }
        means = {f"{metric_key_prefix}_{key}": value for key, value in mean_metrics(by_name).items()}
        if self.state.epoch is not None:
            means["epoch"] = self.state.epoch
        self.log(dict(means))
        metrics |= means
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextmanager
    def _without_early_stopping(self) -> Iterator[None]:
        """While open, early stopping is not told of evaluations: those of single tasks may lack its metric."""
        handler = self.callback_handler
        callbacks = handler.callbacks
        handler.callbacks = [own for own in callbacks if not isinstance(own, EarlyStoppingCallback)]
        try:
            yield
        finally:
            handler.callbacks = callbacks


def mean_metrics(by_name: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means of the metrics that all of several evaluations have; the sum of their times, and rates over that time.

    Args:
        by_name (`dict[str, dict[str, float]]`): metrics without a prefix, by dataset.
    """
    evaluations = list(by_name.values())
    shared = [key for key in evaluations[0] if all(_is_number(own.get(key)) for own in evaluations)]
    means = {key: sum(own[key] for own in evaluations) / len(evaluations) for key in shared}
    if _RUNTIME in means:
        seconds = means[_RUNTIME] = sum(own[_RUNTIME] for own in evaluations)
        for rate in _RATES:
            if rate in means and seconds > 0:
                means[rate] = sum(own[rate] * own[_RUNTIME] for own in evaluations) / seconds
    return means


def _without_prefix(metrics: Mapping[str, float], prefix: str, shared_prefix: str) -> dict[str, float]:
    """Metrics by their own names; trl names those that it adds without the dataset."""
    named = {}
    for key, value in metrics.items():
        own = f"{prefix}_" if key.startswith(f"{prefix}_") else f"{shared_prefix}_"
        if key != "epoch":
            named[key.removeprefix(own)] = value
    return named


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
