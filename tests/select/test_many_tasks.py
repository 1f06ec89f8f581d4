"""With many tasks, choices are estimated first; what is chosen is what predicting everything chooses."""

import numpy as np
import pytest

from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.select import DataSelector, problem
from hf_ensemble.select.groups import direct_search, group_losses
from hf_ensemble.store import FeatureTable


def many_tasks(tasks=40, rows=12, dim=60, seed=0):
    """Tasks of few topics, each with a mean of its own; a fine-tuning lowers each loss by a fifth."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(5, dim))
    means = 0.6 * topics[rng.integers(5, size=tasks)] + 0.4 * rng.normal(size=(tasks, dim))
    names = tuple(f"t{task}" for task in range(tasks))

    def table():
        task = np.repeat(np.arange(tasks), rows)
        features = (rng.normal(size=(len(task), dim)) + means[task]) * np.arange(1, dim + 1) ** -0.5
        ids = np.arange(len(task)).astype(str)
        tokens = 1 + rng.integers(0, 5, len(task))
        return FeatureTable(features.astype(np.float32), rng.normal(size=len(task)), task, names, ids, tokens)

    train, validation = table(), table()
    losses = np.bincount(validation.task, np.logaddexp(0, -validation.margin)) / rows
    run = ObservedRun(dict.fromkeys(names, 1.0), dict(zip(names, 0.8 * losses)))
    weights = {"t3": 0.4, "t7": 2.0}
    return SubsetEstimator(train, validation, observed_runs=[run], sampling_weights=weights)


@pytest.fixture(scope="module")
def estimator():
    return many_tasks()


@pytest.mark.parametrize("size", [2, 8, 25])
def test_a_changed_subset_is_estimated_far_better_than_by_no_change(estimator, size):
    rng = np.random.default_rng(size)
    mask = rng.permutation(40) < size
    mixtures = np.repeat(mask[None], 40, axis=0) ^ np.eye(40, dtype=bool)
    exact = estimator.predict(mixtures.astype(float))
    found = estimator.predict_toggled(mask, np.arange(40))
    assert (found.mixtures == exact.mixtures).all() and np.isnan(found.gradient_norm).all()
    unchanged = estimator.predict(mask[None].astype(float))
    for name, share in (("loss", 0.2), ("coefficients", 0.4)):
        moved = np.abs(getattr(exact, name) - getattr(unchanged, name)).max(axis=1)
        error = np.abs(getattr(found, name) - getattr(exact, name)).max(axis=1)
        assert np.median(error / moved) < share / size**0.5, name


def test_outcomes_that_are_not_needed_are_left_out(estimator):
    subsets = np.eye(40)[:6] + np.eye(40)[1:7]
    needed = subsets > 0
    whole, found = estimator.predict(subsets), estimator.predict(subsets, needed=needed)
    for name in ("loss", "accuracy", "loss_low", "loss_high"):
        assert np.allclose(getattr(found, name)[needed], getattr(whole, name)[needed], rtol=1e-12, atol=0)
        assert np.isnan(getattr(found, name)[~needed]).all()


@pytest.mark.parametrize("asked", [{}, {"max_auxiliary": 6}, {"max_examples": 100, "exclude": ["t9"]}])
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_a_selection_is_that_of_predicting_every_candidate(estimator, monkeypatch, method, asked):
    selector = DataSelector(estimator)
    predicted, predict = [], SubsetEstimator.predict

    def counted(self, mixtures, *args, **kwargs):
        predicted.append(len(mixtures))
        return predict(self, mixtures, *args, **kwargs)

    monkeypatch.setattr(SubsetEstimator, "predict", counted)
    for target in ("t0", ["t1", "t2"]):
        found, counts = [], []
        for slow in (10**9, 60):
            predicted.clear()
            monkeypatch.setattr(problem, "_SLOW", slow)
            found.append(selector.select(target, method, **asked))
            counts.append(sum(predicted))
        exact, screened = found
        assert screened.tasks == exact.tasks and counts[1] < 0.8 * counts[0]
        assert screened.scores == pytest.approx(exact.scores, abs=1e-6)
        for own, other in zip(screened.path, exact.path, strict=True):
            assert own["predicted_loss"] == pytest.approx(other["predicted_loss"], abs=1e-6)


def test_a_grouping_is_no_worse_than_by_predicting_every_change(estimator, monkeypatch):
    selector = DataSelector(estimator)
    for count in (3, 6):
        expected = selector.group(count, affinity_subsets=60)
        monkeypatch.setattr(group_losses, "_SLOW", 50)
        found = selector.group(count, affinity_subsets=60)
        monkeypatch.undo()
        loss, other = found.predicted_loss[str(count)], expected.predicted_loss[str(count)]
        assert loss <= other * (1 + 2e-3)
        assert sorted(name for tasks in found.groups.values() for name in tasks) == sorted(estimator.task_names)


def test_wrong_estimates_do_not_end_a_search_early():
    """Where estimates say that nothing gains, the changes that may still gain are predicted."""
    friends = np.arange(12) % 3
    same = friends[:, None] == friends

    class Wrong:
        def losses(self, trained, members):
            return 2.0 - 0.1 * (trained.astype(float) @ same) + 0.1 * (trained.astype(float) @ ~same)

        def toggled(self, mask, tasks):
            return np.full(len(tasks), float(self.losses(mask[None], mask[None])[0][mask].sum()) + 0.01)

    losses = group_losses.GroupLosses(Wrong())
    losses.is_slow = lambda masks: True
    start = np.random.default_rng(0).permutation(friends)
    found = direct_search.improve_partition(losses, start, np.eye(12), 12)
    assert losses.of_partition(found) < losses.of_partition(start)
