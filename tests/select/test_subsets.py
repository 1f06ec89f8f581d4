"""Subsets of tasks that are fine-tuned: to measure predictions, and to calibrate them."""

import numpy as np

from hf_ensemble.select import calibration_subsets, mixed_subsets


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
