"""What leaving one task out is predicted to do to the others."""

import numpy as np
import pytest

from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.select.left_out import LeftOut, effects_of_leaving_out
from hf_ensemble.store import FeatureTable


def estimator_with(harm, size=5, rows=60, dim=40, seed=0):
    """Tasks that want the same move, but for the last, which wants `-harm` times it."""
    generator = np.random.default_rng(seed)
    move = generator.normal(size=dim) / np.sqrt(dim)
    signs = np.ones(size)
    signs[-1] = -harm
    names = tuple(f"task_{index}" for index in range(size))

    def table(count):
        task = np.repeat(np.arange(size), count)
        features = signs[task, None] * move + 0.3 * generator.normal(size=(len(task), dim)) / np.sqrt(dim)
        margin = generator.normal(size=len(task)).astype(np.float32)
        ids = np.array([str(index) for index in range(len(task))])
        return FeatureTable(features.astype(np.float32), margin, task, names, ids)

    train, validation = table(rows), table(rows)
    losses = np.logaddexp(0, -validation.margin)
    base = {name: float(losses[validation.task == index].mean()) for index, name in enumerate(names)}
    run = ObservedRun(dict.fromkeys(names, 1.0), {name: 0.9 * loss for name, loss in base.items()})
    return SubsetEstimator(train, validation, observed_runs=[run])


@pytest.mark.parametrize("harm, expected", [(1.0, {"task_4": 4}), (-1.0, {})])
def test_the_task_that_hurts_the_others_is_told(harm, expected):
    estimator = estimator_with(harm)
    found = effects_of_leaving_out(estimator)
    assert {task: own.num_better for task, own in found.items() if own.is_harmful} == expected
    names = list(estimator.task_names)
    everything, without = estimator.predict_subsets([names, names[:-1]]).loss
    assert found["task_4"].mean_change == pytest.approx((without - everything)[:-1].mean())


def test_tasks_that_hurt_some_others_alone_have_groups_for_that():
    assert LeftOut(-0.02, 0.004, 8, 9).is_harmful and not LeftOut(-0.02, 0.004, 5, 9).is_harmful
    assert not LeftOut(-0.005, 0.004, 9, 9).is_harmful and not LeftOut(0.02, 0.004, 9, 9).is_harmful


def test_too_few_and_too_many_tasks_are_not_asked_about(monkeypatch):
    monkeypatch.setattr("hf_ensemble.select.left_out._MOST_LEFT_OUT", 4)
    assert effects_of_leaving_out(estimator_with(1.0)) == {}
    assert effects_of_leaving_out(estimator_with(1.0, size=1)) == {}
