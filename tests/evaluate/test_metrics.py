"""Metrics of final answers against values worked out by hand."""

import sys
from types import SimpleNamespace

import pytest

from hf_ensemble.errors import ConfigurationError, TaskError
from hf_ensemble.evaluate import AnswerMetric, metrics_by_task
from hf_ensemble.evaluate.metrics import exact_match, f1


def lengths(predictions, references):
    return {"mean_length": sum(map(len, predictions)) / len(predictions)}


def test_exact_match_ignores_white_space_alone():
    assert exact_match(["a  b", "A b", "-5", "5"], ["a b", "a b", "5", "5"]) == {"exact_match": 0.5}


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("the Cat sat.", "a cat sat", 1.0),
        # Two of three words and two of four: 2 * 2 / (3 + 4).
        ("cat sat down", "big cat sat still", 4 / 7),
        # A word counts as often as it stands on both sides.
        ("no no no", "no", 0.5),
        ("", "", 1.0),
        ("the", "cat", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_f1_is_that_of_squad(prediction, reference, value):
    assert f1([prediction], [reference]) == {"f1": pytest.approx(value)}


def test_texts_without_a_final_answer_count_as_wrong():
    metric = AnswerMetric("the_answer_is", ("exact_match", lengths))
    texts, references = ["the answer is 4.0", "it is 5"], ["2 + 2. The answer is 4.", "the answer is 5"]
    assert metric.score(texts, references) == {"exact_match": 0.5, "mean_length": 0.5}
    assert metric.identity() == {
        "extract": "the_answer_is",
        "metrics": ["exact_match", "lengths"],
        "max_new_tokens": 256,
    }


def test_metrics_of_the_package_evaluate(monkeypatch):
    found = []

    def compute(predictions, references):
        found.append((predictions, references))
        return {"rouge1": 0.25, "precisions": [0.1, 0.2]}

    package = SimpleNamespace(load=lambda name: SimpleNamespace(compute=compute))
    monkeypatch.setitem(sys.modules, "evaluate", package)
    assert AnswerMetric(metrics="rouge").score([" a "], ["b"]) == {"rouge1": 0.25}
    assert found == [(["a"], ["b"])]

    def fails(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(package, "load", fails)
    with pytest.raises(ConfigurationError, match=r"'rouge' is none of \('exact_match', 'f1'\).*no network.*function"):
        AnswerMetric(metrics="rouge")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ConfigurationError, match="not installed. Run pip install evaluate"):
        AnswerMetric(metrics="rouge")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda predictions, references: 0.5, "to return a dict of numbers by name, found 0.5"),
        (lambda predictions, references: {"a": "high"}, "to return a dict of numbers"),
        (lambda predictions, references: {"accuracy": 1.0}, r"returns \['accuracy'\], names of the teacher-forced"),
        (lambda predictions, references: {"exact_match": 1.0}, r"returns \['exact_match'\], as a metric before it"),
        (lambda predictions, references: {"a": float("nan")}, None),
    ],
)
def test_functions_that_give_no_figures_are_refused(metric, message, caplog):
    answers = AnswerMetric(metrics=("exact_match", metric))
    if message is None:
        answers.check("sums", {"0": "5"})
        assert "['a']" in caplog.text and "left out" in caplog.text
        with pytest.raises(ConfigurationError, match="of task 'sums' return no figure"):
            AnswerMetric(metrics=metric).check("sums", {"0": "5"})
    else:
        with pytest.raises(ConfigurationError, match=message):
            answers.check("sums", {"0": "5"})


def test_right_answers_have_to_hold_a_final_answer():
    with pytest.raises(TaskError, match="Task 'sums', example 'b': extract='last_number' finds no final answer .*'x'"):
        AnswerMetric("last_number").check("sums", {"a": "5", "b": "x"})


def test_metrics_by_task():
    one, other = AnswerMetric("yes_no"), AnswerMetric("choice", "f1", 5)
    assert metrics_by_task(None, ["a", "b"]) == {}
    assert metrics_by_task(one, ["a", "b"]) == {"a": one, "b": one}
    assert metrics_by_task("yes_no", ["a"]) == {"a": one}
    settings = {"extract": "choice", "metrics": ["f1"], "max_new_tokens": 5}
    assert metrics_by_task({"b": settings, "a": "yes_no"}, ["a", "b", "c"]) == {"a": one, "b": other}
    for metrics, message in [
        ({"d": one}, r"unknown tasks \['d'\]; the tasks are \['a'\]"),
        ({"a": {"extracts": "x"}}, r"a dict with \['extract', 'metrics', 'max_new_tokens'\]; found \['extracts'\]"),
        ({"a": 3}, "found int"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            metrics_by_task(metrics, ["a"])
    for settings, message in [
        ({"max_new_tokens": 0}, "max_new_tokens has to be a positive integer"),
        ({"metrics": ()}, "Expected names of metrics or functions"),
        ({"metrics": 5}, "Expected names of metrics or functions"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            AnswerMetric(**settings)
