"""The rows whose losses are predicted."""

import copy
from collections.abc import Mapping

import numpy as np

from ..errors import EstimationError
from ..store import FeatureTable, row_blocks
from .outcomes import predicted_outcomes
from .output_scale import ScaledRows
from .search_rows import sampled_rows


class ValidationRows:
    """Validation rows, sorted by task.

    Args:
        table (`FeatureTable`): their ids and margins.
        features (`np.ndarray` of shape `(n, k)`): their reduced features.

    Raises:
        `EstimationError`: for features that are not finite.
    """

    def __init__(self, table: FeatureTable, features: np.ndarray):
        if not all(np.isfinite(block).all() for _, block in row_blocks(features)):
            raise EstimationError("Expected finite validation features, found NaN or infinity. Capture them again.")
        order = np.argsort(table.task, kind="stable")
        self.features = features[order] if (np.diff(table.task) < 0).any() else features
        self.margin = table.margin[order].astype(np.float64)
        self.task = table.task[order]
        self._entropy = None if table.other_entropy is None else table.other_entropy[order].astype(np.float64)
        # How many rows of its task each one stands for, in the prior of the task's scale.
        self._rows_per_row = table.rows_per_captured
        self.is_scaled = False
        self._ids = table.example_id[order]
        self._names = table.task_names

    @property
    def can_be_scaled(self) -> bool:
        """Whether it is known of any row how its loss changes with the scale of the logits."""
        return self._entropy is not None and not np.isnan(self._entropy).all()

    def scaled(self) -> "ValidationRows":
        """The same rows with losses after the scale of each task's outputs is fitted, see [`ScaledRows`]."""
        other = copy.copy(self)
        other.is_scaled = True
        return other

    def truncated(self, num_components: int) -> "ValidationRows":
        """The same rows in their first components."""
        other = copy.copy(self)
        other.features = np.ascontiguousarray(self.features[:, :num_components])
        return other

    def of_tasks(self, tasks: np.ndarray) -> "ValidationRows":
        """The rows of the tasks in a mask `(T,)`."""
        return self._of_rows(tasks[self.task])

    def sampled(self, most_rows: int, seed: int = 0) -> "ValidationRows":
        """Some rows of each task; see [`sampled_rows`]."""
        other = self._of_rows(sampled_rows(self.task, self.margin, most_rows, seed))
        other._rows_per_row = self._rows_per_row * self._counts / np.maximum(other._counts, 1)
        return other

    def halves(self, seed: int = 0) -> tuple["ValidationRows", "ValidationRows"]:
        """Two random halves of each task's rows; a task's only row is in both."""
        generator = np.random.default_rng(seed)
        first, second = np.zeros(len(self.task), dtype=bool), np.zeros(len(self.task), dtype=bool)
        for task in np.unique(self.task):
            rows = generator.permutation(np.flatnonzero(self.task == task))
            middle = (len(rows) + 1) // 2
            first[rows[:middle]], second[rows[middle:] if len(rows) > 1 else rows] = True, True
        return self._of_rows(first), self._of_rows(second)

    def _of_rows(self, kept: np.ndarray) -> "ValidationRows":
        other = copy.copy(self)
        other.features, other.margin, other.task = self.features[kept], self.margin[kept], self.task[kept]
        other._ids = self._ids[kept]
        other._entropy = None if self._entropy is None else self._entropy[kept]
        return other

    def outcomes(
        self, coefficients: np.ndarray, needed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses, accuracies and displacements `(S, T)` at optima `(S, k)`; see [`predicted_outcomes`]."""
        rows = self.features, self.margin, self.task, len(self._names), np.atleast_2d(coefficients)
        return predicted_outcomes(*rows, needed, self._scaled_rows if self.is_scaled else None)

    def losses_with_slopes(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each task's mean loss at w `(k,)`, `(T,)`, and its derivative in each row's margin, `(n,)`."""
        z, counts = self.margins(w), self._counts
        if self.is_scaled:
            known, losses = np.flatnonzero(counts), np.zeros(len(counts))
            losses[known], slopes = self._scaled_rows(known).losses_with_slopes(z)
            return losses, slopes
        counts = np.maximum(counts, 1)
        losses = np.bincount(self.task, np.logaddexp(0.0, -z), len(counts)) / counts
        return losses, -np.exp(-np.logaddexp(0.0, z)) / counts[self.task]

    @property
    def _counts(self) -> np.ndarray:
        return np.bincount(self.task, minlength=len(self._names))

    def _scaled_rows(self, tasks: np.ndarray) -> ScaledRows:
        """The rows of tasks `(t,)`, in this order."""
        counts = self._counts
        ends = np.cumsum(counts)
        own = np.concatenate([self._entropy[ends[index] - counts[index] : ends[index]] for index in tasks.tolist()])
        return ScaledRows(own, counts[tasks], self._rows_per_row[tasks])

    def __len__(self) -> int:
        return len(self.task)

    def margins(self, w: np.ndarray) -> np.ndarray:
        """Margin m_i + x_i.w of every row, `(n,)`."""
        return self.margin + self.features @ w

    def by_example(self, w: np.ndarray) -> dict[tuple[str, str], float]:
        """Margin of every row by (task, example id)."""
        names = (self._names[index] for index in self.task)
        return dict(zip(zip(names, self._ids.tolist()), self.margins(w).tolist()))

    def loss_variance(
        self, w: np.ndarray, sizes: np.ndarray, needed: np.ndarray, anchors: Mapping[int, np.ndarray]
    ) -> np.ndarray:
        """Variance of each task's mean loss at w, as that of all its rows `(T,)`, of which these are a sample, `(T,)`.

        (1 - n / N) s^2 / n with the variance s^2 of the n captured rows' losses, or of their residuals from those at an
        optimum by the task's index, see [`SamplingNoise`]; zero where they are all N rows, NaN where it is one of
        several.
        """
        found = np.zeros(len(sizes))
        for index in np.flatnonzero(needed):
            rows = slice(*np.searchsorted(self.task, (index, index + 1)))
            count = int(rows.stop - rows.start)
            if count < sizes[index]:
                margin, x = self.margin[rows], self.features[rows]
                losses = np.logaddexp(0.0, -(margin + x @ w))
                if index in anchors:
                    known = np.logaddexp(0.0, -(margin + x @ anchors[index]))
                    losses = losses - known * (losses.mean() / max(known.mean(), np.finfo(float).tiny))
                variance = losses.var(ddof=1) if count > 1 else np.nan
                found[index] = (1 - count / sizes[index]) * variance / count
        return found

    def spread(self, coefficients: np.ndarray, reference: np.ndarray, weights: np.ndarray, metric: str) -> np.ndarray:
        """Standard error over the rows of weighted scores at optima `(S, k)` minus those at one `(k,)`, `(S,)`."""
        variance = np.zeros(len(coefficients))
        for index in np.flatnonzero(weights):
            rows = slice(*np.searchsorted(self.task, (index, index + 1)))
            z = self.margin[rows] + np.vstack([coefficients, reference]) @ self.features[rows].T
            if self.is_scaled and metric == "loss":
                z = self._scaled_rows(np.array([index])).scaled(z)
            scores = (z > 0).astype(np.float64) if metric == "accuracy" else np.logaddexp(0.0, -z)
            variance += weights[index] ** 2 * (scores[:-1] - scores[-1]).var(axis=1) / (rows.stop - rows.start)
        return np.sqrt(variance)
