"""Metrics of generated answers: exact match, F1, those of the package `evaluate`, and functions."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from ..errors import ConfigurationError
from ..logging import get_logger

logger = get_logger(__name__)

# From predictions and references, both final answers, to figures by name.
Metric = Callable[[list[str], list[str]], Mapping[str, float]]

# Names that every task's scores have already.
_TAKEN = ("loss", "accuracy", "num_examples")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Share of the predictions that are their references, but for white space."""
    pairs = zip(predictions, references)
    return {"exact_match": _mean([float(found.split() == expected.split()) for found, expected in pairs])}


def f1(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean F1 of the words that prediction and reference share, normalized as in SQuAD (arXiv 1606.05250).

    Case, punctuation and the articles a, an, the do not count. Without any word on either side, F1 is 1 if both have
    none and 0 otherwise.
    """
    return {"f1": _mean([_word_f1(found, expected) for found, expected in zip(predictions, references)])}


METRICS: dict[str, Metric] = {"exact_match": exact_match, "f1": f1}
# Those whose figure is the mean of what they give for each row alone.
MEANS_OVER_ROWS: tuple[Metric, ...] = (exact_match, f1)


def load_metric(metric: str | Metric) -> Metric:
    """The function of a metric.

    Args:
        metric (`str` or `Callable`):
            `"exact_match"`, `"f1"`, a metric of the package `evaluate` (a name, or the path of its script), or a
            function from predictions and references to a dict of numbers.

    Raises:
        `ConfigurationError`: for a metric that `evaluate` cannot load.
    """
    if callable(metric):
        return metric
    return METRICS.get(metric) or _of_evaluate(metric)


def metric_name(metric: str | Metric) -> str:
    """What messages and records call a metric."""
    return metric if isinstance(metric, str) else getattr(metric, "__qualname__", type(metric).__name__)


def figures_of(metric: Metric, name: str, predictions: list[str], references: list[str]) -> dict[str, float]:
    """The figures that a metric gives; those that are not finite are left out with a warning.

    Raises:
        `ConfigurationError`: for anything but a dict of numbers, and for names that scores have already.
    """
    figures = metric(predictions, references)
    if not isinstance(figures, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Real) for key, value in figures.items()
    ):
        raise ConfigurationError(
            f"Expected the metric {name!r} to return a dict of numbers by name, found {figures!r:.120}."
        )
    taken = sorted(set(figures) & set(_TAKEN))
    if taken:
        raise ConfigurationError(
            f"The metric {name!r} returns {taken}, names of the teacher-forced scores. Wrap it in a function that "
            "returns its figures under other names."
        )
    lost = sorted(key for key, value in figures.items() if not math.isfinite(value))
    if lost:
        logger.warning("The figures %s of the metric %r are not finite and are left out.", lost, name)
    return {key: float(value) for key, value in figures.items() if key not in lost}


def _of_evaluate(name: str) -> Metric:
    """A metric of the package `evaluate`: its figures that are single numbers."""
    known = f"{name!r} is none of {tuple(METRICS)}, so it is looked for in the package evaluate"
    try:
        import evaluate
    except ImportError as error:
        raise ConfigurationError(f"{known}, which is not installed. Run pip install evaluate.") from error
    try:
        loaded = evaluate.load(name)
    except Exception as error:  # whatever downloads, scripts and their own imports raise
        raise ConfigurationError(
            f"{known}, which cannot load it: {error}. Check the name; without a network, pass the path of the metric's "
            "script, or a function from predictions and references to a dict of numbers."
        ) from error

    def compute(predictions: list[str], references: list[str]) -> dict[str, float]:
        try:
            figures: dict[str, Any] = loaded.compute(predictions=predictions, references=references) or {}
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"The metric {name!r} of the package evaluate does not take texts: {error}. Pass a function that "
                "converts predictions and references for it."
            ) from error
        return {key: float(value) for key, value in figures.items() if isinstance(value, Real)}

    return compute


def _word_f1(prediction: str, reference: str) -> float:
    found, expected = _words(prediction), _words(reference)
    if not found or not expected:
        return float(found == expected)
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
