"""What a row's loss counts in the estimate is what it counts in the training."""

import numpy as np
import pytest

from helpers.feature_tables import NAMES, world
from hf_ensemble import DataSelector
from hf_ensemble.errors import ConfigurationError, EstimationError
from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.estimate.mixtures import loss_weights
from hf_ensemble.estimate.surrogate import solve_surrogate


@pytest.mark.parametrize("tokens", [False, True])
def test_tasks_count_equally_whatever_their_tokens_and_draws(tokens):
    train, _ = world(tokens=tokens)
    drawn = np.array([1.0, 0.5, 2.0, 1.0])
    counted = loss_weights(train, "tasks", drawn)
    assert counted.mean() == pytest.approx(1)
    totals = np.bincount(train.task, counted * drawn[train.task])
    assert np.allclose(totals, totals[0])
    # Within a task they count by their tokens.
    own = train.task == 0
    plain = loss_weights(train, "tokens", drawn)
    assert np.allclose(counted[own] / counted[own].sum(), plain[own] / plain[own].sum())
    assert (loss_weights(train, "convergence", drawn) == counted).all()
    with pytest.raises(EstimationError, match="task_loss_weighting has to be one of"):
        loss_weights(train, "rows", drawn)


def test_a_subset_is_the_mean_of_its_tasks_and_as_long_as_it_is_drawn():
    train, validation = world(tokens=True)
    drawn = dict(zip(NAMES, [1.0, 0.5, 2.0, 1.0]))
    estimator = SubsetEstimator(train, validation, sampling_weights=drawn, task_loss_weighting="tasks")
    scale = estimator.regularization.l2_scale
    found = estimator.predict(np.array([[1.0, 1.0, 0.0, 0.0]]), l2_scale=scale).coefficients[0]
    features = estimator.reduction.apply(train.features)
    means = np.array([train.num_tokens[train.task == k].sum() for k in range(4)])
    # An epoch has sum_k a_k n_k / max_k a_k rows, which the weights of losses do not change.
    l2 = scale / (estimator.counts @ [1.0, 0.5, 0.0, 0.0])
    mixture = np.array([[1.0, 1.0, 0.0, 0.0]])
    counted = train.num_tokens / means[train.task]
    expected = solve_surrogate(features, train.margin, train.task, mixture, np.array([l2]), row_weights=counted)
    assert np.allclose(found, expected.coefficients[0], atol=1e-5)
    assert estimator.provenance()["task_loss_weighting"] == "tasks"
    with pytest.raises(ConfigurationError, match="mixture weighs tasks by how often .*'tasks'"):
        DataSelector(estimator).mixture("a")
