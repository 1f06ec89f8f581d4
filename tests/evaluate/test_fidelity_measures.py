import numpy as np
import pytest

from hf_ensemble.evaluate.fidelity_measures import (
    correlation,
    coverage,
    mean_or_nan,
    mean_relative_error,
    task_spearman,
)
from hf_ensemble.select import calibration_subsets, mixed_subsets

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


def test_mixed_subsets_are_different_and_of_every_size():
    subsets = mixed_subsets(15, 60, seed=3)
    assert subsets.shape == (60, 15) and len(np.unique(subsets, axis=0)) == 60
    assert {1, 15} <= set(subsets.sum(axis=1).astype(int))
    assert (subsets.sum(axis=0) > 5).all()
    assert np.array_equal(subsets, mixed_subsets(15, 60, seed=3))
    assert not np.array_equal(subsets, mixed_subsets(15, 60, seed=4))
    assert set(mixed_subsets(6, 10, sizes=[2, 3]).sum(axis=1)) == {2.0, 3.0}
    # Three tasks have seven subsets.
    assert len(mixed_subsets(3, 100)) == 7


def test_calibration_begins_with_all_tasks():
    names = [f"t{i}" for i in range(10)]
    assert calibration_subsets(names, 0) == []
    everything, few, other = calibration_subsets(names, 3)
    assert everything == names and len(few) == len(other) == 2 and not set(few) & set(other)
