"""Principal components of the gradient features.

Features may be a memory map of any float type: they are read in blocks and never copied as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from ..errors import EstimationError

# Maximum number of features in memory at once, in float64.
_BLOCK = 8_000_000


@dataclass(frozen=True)
class FeatureReduction:
    """A linear map from captured features to normalized principal components, and back.

    Args:
        scale (`float`): mean row norm of the training features, by which they are divided.
        components (`np.ndarray` of shape `(d, k)`): orthonormal columns.
    """

    scale: float
    components: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, num_components: int) -> "FeatureReduction":
        """Compute the leading principal directions of training features `(n, d)`, without centering.

        The surrogate's optimum is a linear combination of the training rows, so as many components as rows lose
        nothing. The features are not centered, because the surrogate has no intercept to absorb their mean.

        Raises:
            `EstimationError`: for features that are not finite or all zero.
        """
        n, d = features.shape
        scale = sum(_row_norms(start, block).sum() for start, block in _blocks(features)) / n
        if scale == 0:
            raise EstimationError(
                "Expected nonzero gradient features, found zeros only. Check that the adapter is active."
            )
        k = min(num_components, n, d)
        if d <= n:
            _, vectors = eigh(_gram(features), subset_by_index=[d - k, d - 1])
            components = vectors[:, ::-1]
        else:
            values, vectors = eigh(_gram(features.T), subset_by_index=[n - k, n - 1])
            kept = values > values[-1] * 1e-12
            left = vectors[:, kept] / np.sqrt(values[kept])
            right = sum(block.T @ left[start : start + len(block)] for start, block in _blocks(features))
            components = right[:, ::-1]
        return cls(float(scale), np.ascontiguousarray(components))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Map features `(n, d)` to components `(n, k)`, float64."""
        out = np.empty((len(features), self.components.shape[1]))
        for start, block in _blocks(features):
            np.matmul(block, self.components, out=out[start : start + len(block)])
        out /= self.scale
        return out

    def restore(self, w: np.ndarray) -> np.ndarray:
        """Map coefficients `(..., k)` of the components to coefficients `(..., d)` of the captured features."""
        return w @ self.components.T / self.scale


def squared_row_norms(features: np.ndarray) -> np.ndarray:
    """Squared row norms `(n,)` of features `(n, d)`, float64."""
    return np.concatenate([np.einsum("ij,ij->i", block, block) for _, block in _blocks(features)])


def _blocks(features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Consecutive blocks of rows: index of the first row, and a float64 copy."""
    rows = max(1, _BLOCK // features.shape[1])
    for start in range(0, len(features), rows):
        yield start, features[start : start + rows].astype(np.float64)


def _gram(features: np.ndarray) -> np.ndarray:
    """X^T X of features `(n, d)`, `(d, d)`."""
    return sum(block.T @ block for _, block in _blocks(features))


def _row_norms(start: int, block: np.ndarray) -> np.ndarray:
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise EstimationError(f"Row {start + int(np.argmin(finite))} has a feature that is not finite.")
    return np.linalg.norm(block, axis=1)
