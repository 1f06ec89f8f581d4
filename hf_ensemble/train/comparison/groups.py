"""Groups of tasks that no prediction chooses."""

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans

from ...estimate import SubsetEstimator


def random_groups(names: Sequence[str], num_groups: int, seed: int) -> list[list[str]]:
    """A random partition of the tasks into groups whose sizes differ by at most one."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [[names[index] for index in sorted(order[start::num_groups])] for start in range(num_groups)]


def gradient_clusters(estimator: SubsetEstimator, num_groups: int) -> list[list[str]]:
    """Clusters of the tasks' mean gradients by direction, by k-means.

    [2502.00089](https://arxiv.org/abs/2502.00089) clusters the rows' gradients.
    """
    gradients = estimator.task_gradients()
    gradients = gradients / np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-12)
    labels = KMeans(num_groups, n_init=10, random_state=0).fit_predict(gradients)
    return [[name for name, own in zip(estimator.task_names, labels) if own == label] for label in sorted(set(labels))]
