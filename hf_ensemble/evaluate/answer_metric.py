"""`AnswerMetric`: how a task's generated answers are scored."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .._settings import check_at_least
from ..errors import ConfigurationError, TaskError
from .extraction import Extractor, extractor
from .metrics import MEANS_OVER_ROWS, Metric, figures_of, load_metric, metric_name

# Reference answers that a metric is tried on before anything is trained.
_TRIED = 8


@dataclass(frozen=True)
class AnswerMetric:
    """How the generated answers of a task are scored.

    The final answer is taken from the generated text and from the reference alike, and the metrics compare the two. A
    text without a final answer counts as an empty one.

    Args:
        extract (`str` or `Callable`, *optional*, defaults to `"whole_text"`):
            What the final answer is: `"number_after_hashes"` (GSM8K), `"the_answer_is"`, `"choice"` (a letter),
            `"yes_no"`, `"last_number"` or `"whole_text"`; a regular expression with one group; or a function from a
            text to its final answer, or to `None` where it has none.
        metrics (`str`, `Callable` or a sequence of them, *optional*, defaults to `("exact_match", "f1")`):
            `"exact_match"`, `"f1"` (of words, as in SQuAD), metrics of the package `evaluate` by name, and functions
            from predictions and references to a dict of numbers. Choices are made by the first figure of the first
            metric, of which more has to be better.
        max_new_tokens (`int`, *optional*, defaults to 256): tokens after which generation stops.

    Raises:
        `ConfigurationError`: for an unknown extraction, and for metrics that cannot be loaded.

    Example:

    ```python
    >>> metric = AnswerMetric("the_answer_is")
    >>> metric.score(["2 + 2 = 4. The answer is 4."], ["The answer is 4.0"])
    {'exact_match': 1.0, 'f1': 1.0}
    ```
    """

    extract: str | Extractor = "whole_text"
    metrics: str | Metric | Sequence[str | Metric] = ("exact_match", "f1")
    max_new_tokens: int = 256
    _extract: Extractor = field(init=False, repr=False, compare=False)
    _metrics: list[tuple[str, Metric]] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        is_one = isinstance(self.metrics, str) or callable(self.metrics)
        metrics = (self.metrics,) if is_one else tuple(self.metrics) if isinstance(self.metrics, Sequence) else ()
        if not metrics or not all(isinstance(metric, str) or callable(metric) for metric in metrics):
            raise ConfigurationError(f"Expected names of metrics or functions in metrics, found {self.metrics!r}.")
        object.__setattr__(self, "metrics", metrics)
        object.__setattr__(self, "_extract", extractor(self.extract))
        object.__setattr__(self, "_metrics", [(metric_name(metric), load_metric(metric)) for metric in metrics])

    def final_answer(self, text: str) -> str | None:
        """The final answer of a text; `None` where it has none."""
        return self._extract(text)

    def score(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Figures of generated texts, by name.

        Args:
            texts (`Sequence[str]`): generated texts.
            references (`Sequence[str]`): the right texts, in the same order.

        Raises:
            `ConfigurationError`: for a metric that does not return numbers by name.
        """
        found, expected = ([self._extract(text) or "" for text in own] for own in (texts, references))
        figures: dict[str, float] = {}
        for name, metric in self._metrics:
            own = figures_of(metric, name, found, expected)
            twice = sorted(set(own) & set(figures))
            if twice:
                raise ConfigurationError(
                    f"The metric {name!r} returns {twice}, as a metric before it does. Leave one of them out."
                )
            figures |= own
        return figures

    def score_rows(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
        """Values of the single rows, of the figures that are means over rows; arguments as for [`score`]."""
        pairs = [(self._extract(text) or "", self._extract(own) or "") for text, own in zip(texts, references)]
        means = [metric for _, metric in self._metrics if metric in MEANS_OVER_ROWS]
        rows = [[metric([found], [expected]) for found, expected in pairs] for metric in means]
        return {name: np.array([row[name] for row in own]) for own in rows for name in own[0]}

    def check(self, task: str, references: Mapping[str, str]) -> None:
        """Make sure that a task's right answers can be scored.

        Args:
            task (`str`): the task's name, for errors.
            references (`dict[str, str]`): the right text of each row, by example id.

        Raises:
            `TaskError`: for a right text without a final answer.
            `ConfigurationError`: for a metric that returns no figure, or no numbers by name.
        """
        for example, text in references.items():
            if not self._extract(text):
                raise TaskError(
                    f"Task {task!r}, example {example!r}: extract={metric_name(self.extract)!r} finds no final answer "
                    f"in the right text {text!r:.120}. Choose another extraction for this task, or drop the row."
                )
        tried = list(references.values())[:_TRIED]
        if not self.score(tried, tried):
            raise ConfigurationError(f"The metrics {self._names} of task {task!r} return no figure.")

    def identity(self) -> dict[str, Any]:
        """The settings as JSON values; functions by their names."""
        return {
            "extract": metric_name(self.extract),
            "metrics": self._names,
            "max_new_tokens": self.max_new_tokens,
        }

    @property
    def _names(self) -> list[str]:
        return [name for name, _ in self._metrics]

    @classmethod
    def of(cls, value: Any) -> "AnswerMetric":
        """From an extraction alone, or from the fields by name, as command lines and YAML have them.

        Raises:
            `ConfigurationError`: for anything else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str) or callable(value):
            return cls(value)
        names = [own.name for own in fields(cls) if own.init]
        if not isinstance(value, Mapping) or not set(value) <= set(names):
            found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise ConfigurationError(
                f"Expected an AnswerMetric, what to extract, or a dict with {names}; found {found}."
            )
        return cls(**value)


AnswerMetrics = AnswerMetric | str | Callable | Mapping[str, AnswerMetric | str | Callable | Mapping[str, Any]] | None


def metrics_by_task(metrics: AnswerMetrics, tasks: Iterable[str]) -> dict[str, AnswerMetric]:
    """The answer metric of each task that has one.

    Args:
        metrics (`AnswerMetric` or `dict[str, AnswerMetric]`, *optional*): one for all tasks, or one for each named.
        tasks (`Iterable[str]`): the tasks.

    Raises:
        `ConfigurationError`: for unknown tasks, and for what [`AnswerMetric.of`] refuses.
    """
    tasks = list(tasks)
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        return dict.fromkeys(tasks, AnswerMetric.of(metrics))
    unknown = sorted(map(str, set(metrics) - set(tasks)))
    if unknown:
        raise ConfigurationError(f"answer_metrics names unknown tasks {unknown}; the tasks are {tasks}.")
    return {task: AnswerMetric.of(metrics[task]) for task in tasks if task in metrics}
