"""Partitions of an affinity matrix. Pure functions of arrays."""

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import SpectralClustering, SpectralCoclustering

from ...errors import EstimationError


def spectral_partition(affinity: np.ndarray, num_groups: int, seed: int = 0) -> np.ndarray:
    """Group of each task by spectral clustering of the symmetrized affinity, `(T,)`.

    Args:
        affinity (`np.ndarray` of shape `(T, T)`): higher is better.
        num_groups (`int`): number of groups.
        seed (`int`, *optional*, defaults to 0): seed of k-means.
    """
    if num_groups == 1 or num_groups >= len(affinity):
        return np.zeros(len(affinity), dtype=int) if num_groups == 1 else np.arange(len(affinity))
    similarity = _positive((affinity + affinity.T) / 2)
    model = SpectralClustering(num_groups, affinity="precomputed", random_state=seed, assign_labels="kmeans", n_init=20)
    return canonical(model.fit_predict(similarity))


def coclustering(affinity: np.ndarray, num_groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping groups of tasks and their helpers by spectral co-clustering (Dhillon 2001).

    Rows of the affinity are the tasks that are helped, columns the tasks that help. A group trains on both its rows and
    its columns, so a task whose column lies in another group is in both.

    Args:
        affinity (`np.ndarray` of shape `(T, T)`): higher is better; not symmetrized.
        num_groups (`int`): number of groups; fewer are returned when some would have no row.
        seed (`int`, *optional*, defaults to 0): seed of k-means.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: group of each task `(T,)`, and what each group trains on, `(G, T)` masks.
    """
    size = len(affinity)
    if num_groups == 1 or num_groups >= size:
        rows = columns = np.zeros(size, dtype=int) if num_groups == 1 else np.arange(size)
    else:
        similarity = _positive(affinity)
        # A task's own rows help it most.
        np.fill_diagonal(similarity, similarity.max(axis=1))
        model = SpectralCoclustering(num_groups, random_state=seed, n_init=20).fit(similarity)
        rows, columns = model.row_labels_, model.column_labels_
    labels = canonical(rows)
    names = list(dict.fromkeys(rows.tolist()))
    trained = np.stack([(rows == name) | (columns == name) for name in names])
    return labels, trained


def _positive(affinity: np.ndarray) -> np.ndarray:
    """Positive similarities in the order of the affinities."""
    spread = affinity[~np.eye(len(affinity), dtype=bool)].std() or 1.0
    return np.exp(affinity / spread)


def semidefinite_partition(
    affinity: np.ndarray, num_groups: int | None = None, trace_penalty: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Group of each task by the semidefinite relaxation of the best partition.

    A partition is the matrix X with X_ij = 1 / |group| for two tasks of one group and 0 otherwise; its trace is the
    number of groups. The relaxation (EnsembleLoRA, arXiv 2505.21930)

        max <T, X> - penalty * trace(X)   subject to  X e = e,  X >= 0 elementwise,  X positive semidefinite

    determines the number of groups by its penalty; with `num_groups` the trace is fixed instead. X is rounded by
    average-linkage clustering of its entries.

    Args:
        affinity (`np.ndarray` of shape `(T, T)`): higher is better.
        num_groups (`int`, *optional*): number of groups.
        trace_penalty (`float`, *optional*):
            Penalty for one more group. Twice the standard deviation of the affinities by default.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: groups `(T,)` and the relaxed X `(T, T)`.

    Raises:
        `EstimationError`: when the solver finds no optimum.
    """
    import cvxpy

    size = len(affinity)
    symmetric = (affinity + affinity.T) / 2
    x = cvxpy.Variable((size, size), PSD=True)
    constraints = [x >= 0, cvxpy.sum(x, axis=1) == 1]
    objective = cvxpy.trace(symmetric @ x)
    if num_groups is not None:
        constraints.append(cvxpy.trace(x) == num_groups)
    else:
        off_diagonal = symmetric[~np.eye(size, dtype=bool)]
        penalty = trace_penalty if trace_penalty is not None else 2 * float(off_diagonal.std()) if size > 1 else 0.0
        objective = objective - penalty * cvxpy.trace(x)
    problem = cvxpy.Problem(cvxpy.Maximize(objective), constraints)
    problem.solve()
    if problem.status not in ("optimal", "optimal_inaccurate"):
        raise EstimationError(
            f"The semidefinite program ended with status {problem.status!r}. Use method='spectral' instead."
        )
    relaxed = np.clip((x.value + x.value.T) / 2, 0.0, None)
    count = num_groups if num_groups is not None else int(np.clip(round(float(np.trace(relaxed))), 1, size))
    return _round(relaxed, count), relaxed


def _round(relaxed: np.ndarray, num_groups: int) -> np.ndarray:
    """Groups from a relaxed partition matrix: tasks belong together when their entry is as large as their diagonals."""
    if len(relaxed) == 1:
        return np.zeros(1, dtype=int)
    diagonal = np.sqrt(np.maximum(np.diag(relaxed), 1e-12))
    distance = 1.0 - np.clip(relaxed / np.outer(diagonal, diagonal), 0.0, 1.0)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average")
    return canonical(fcluster(tree, t=num_groups, criterion="maxclust"))


def canonical(labels: np.ndarray) -> np.ndarray:
    """The same groups, numbered from 0 by their first task."""
    first = {label: i for i, label in enumerate(dict.fromkeys(np.asarray(labels).tolist()))}
    return np.array([first[label] for label in np.asarray(labels).tolist()])
