import numpy as np
import pytest

from hf_ensemble.evaluate.fidelity_measures import (
    correlation,
    coverage,
    mean_or_nan,
    mean_relative_error,
    task_spearman,
)

TRUE = np.array([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])


def test_spearman_is_of_each_task_over_the_subsets():
    assert task_spearman(TRUE**3, TRUE).tolist() == pytest.approx([1.0, 1.0])
    assert task_spearman(-TRUE, TRUE).tolist() == pytest.approx([-1.0, -1.0])
    counted = np.array([[True, False], [True, True], [True, True], [False, True]])
    swapped = TRUE.copy()
    swapped[3, 0] = -10.0
    assert task_spearman(swapped, TRUE, counted).tolist() == pytest.approx([1.0, 1.0])
    assert task_spearman(swapped, TRUE)[0] < 1


def test_measures_that_are_not_defined_are_nan():
    ranks = task_spearman(TRUE, TRUE, np.array([[True, True]] * 2 + [[False, True]] * 2))
    assert np.isnan(ranks[0]) and ranks[1] == pytest.approx(1.0)
    assert np.isnan(task_spearman(np.ones((4, 2)), TRUE)).all()
    assert mean_or_nan(ranks) == pytest.approx(1.0)
    assert np.isnan(mean_or_nan(np.array([np.nan])))
    assert np.isnan(correlation(np.ones((4, 2)), TRUE))


def test_errors_and_coverage():
    assert mean_relative_error(TRUE * 1.1, TRUE) == pytest.approx(0.1)
    assert correlation(2 * TRUE + 1, TRUE) == pytest.approx(1.0)
    high = TRUE + np.array([[1.0, -0.1]])
    assert coverage(TRUE - 1, high, TRUE) == 0.5
