"""Forward selection whose candidates are verified."""

import numpy as np
import pytest

from helpers.feature_tables import world
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.select import DataSelector, SelectionSettings


@pytest.fixture(scope="module")
def selector():
    return DataSelector(SubsetEstimator(*world()))


class Judge:
    """Scores an optimum by the task that it was made with."""

    def __init__(self, selector, scores):
        self.names, self.calls = selector.estimator.task_names, []
        predict = selector.estimator.predict_subsets
        self.known = {
            frozenset(subset): (predict([list(subset)]).coefficients[0], score) for subset, score in scores.items()
        }

    def __call__(self, coefficients):
        for subset, (own, score) in self.known.items():
            if np.allclose(own, coefficients, rtol=0, atol=1e-5):
                self.calls.append(subset)
                return score
        self.calls.append(None)
        return 0.0


def test_equal_scores_leave_plain_forward_selection(selector):
    plain = selector.select("a")
    verified = selector.select("a", metric="answers", verify=lambda coefficients: 0.5)
    assert verified.tasks == plain.tasks and verified.method == "forward"
    assert [step["predicted_loss"] for step in verified.path] == [step["predicted_loss"] for step in plain.path]
    assert {step["answered"] for step in verified.path} == {0.5}
    assert verified.summary.endswith("Verified by generated answers: 0.500 to 0.500.")


def test_the_best_verified_candidate_is_taken_and_the_search_ends_without_one(selector):
    names = [name for name in selector.estimator.task_names if name != "a"]
    losses = selector.estimator.predict_subsets([["a", name] for name in names]).loss
    ranked = [names[i] for i in np.argsort(losses[:, selector.estimator.task_names.index("a")])]
    second = ranked[1]
    judge = Judge(selector, {("a",): 0.25, ("a", ranked[0]): 0.25, ("a", second): 0.75})
    found = selector.select("a", metric="answers", verified_candidates=2, verify=judge)
    assert found.tasks == ["a", second]
    assert found.path[1]["verified"] == {ranked[0]: 0.25, second: 0.75} and found.path[1]["answered"] == 0.75
    # The target alone, two candidates of the first step, two (or what is left) of the second.
    assert judge.calls[:3] == [frozenset("a"), frozenset(["a", ranked[0]]), frozenset(["a", second])]
    assert len(judge.calls) == 3 + min(2, len(names) - 1)


def test_the_budget_of_verified_candidates_is_kept(selector):
    calls = []
    found = selector.select(
        "a", metric="answers", max_verified=2, verify=lambda coefficients: calls.append(1) or len(calls)
    )
    assert len(calls) == 2 and len(found.tasks) == 2
    assert found.settings["max_verified"] == 2 and found.settings["verified_candidates"] == 3


def test_answers_need_the_model_and_forward_selection(selector):
    with pytest.raises(ConfigurationError, match="metric='answers' needs the model.*Use SelectionSFTTrainer"):
        selector.select("a", metric="answers")
    with pytest.raises(ConfigurationError, match="found selection_method='backward'"):
        SelectionSettings("backward", selection_metric="answers")
    for field, message in (("verified_candidates", "positive integer"), ("max_verified", "positive integer or None")):
        with pytest.raises(ConfigurationError, match=f"{field} has to be a {message}"):
            SelectionSettings(**{field: 0})
