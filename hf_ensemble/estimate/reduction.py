"""Capture wide, solve narrow: principal components of the gradient features.

Features may be a memory map of any float type: they are read in blocks, and no copy of all of them is made.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from ..errors import EstimationError

# Features that are held in float64 at once.
_BLOCK = 8_000_000


@dataclass(frozen=True)
class FeatureReduction:
    """A linear map from captured features to a few normalised components, and back.

    Args:
        scale (`float`): mean row norm of the training features; they are divided by it.
        components (`np.ndarray` of shape `(d, k)`): orthonormal columns.
    """

    scale: float
    components: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, num_components: int) -> "FeatureReduction":
        """The leading principal directions of training features `(n, d)`, about the origin.

        A surrogate's optimum is a combination of the training rows, so with as many components as rows nothing is lost.
        The features are not centred: the surrogate has no intercept that could take up their mean.

        Raises:
            `EstimationError`: for features that are not finite or all zero.
        """
        n, d = features.shape
        scale = sum(_row_norms(start, block).sum() for start, block in _blocks(features)) / n
        if scale == 0:
            raise EstimationError("Every gradient feature is zero: at this point no example moves the adapter.")
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
        """Features `(n, d)` to components `(n, k)`, float64."""
        out = np.empty((len(features), self.components.shape[1]))
        for start, block in _blocks(features):
            np.matmul(block, self.components, out=out[start : start + len(block)])
        out /= self.scale
        return out

    def restore(self, w: np.ndarray) -> np.ndarray:
        """Coefficients of the components `(..., k)` to coefficients of the captured features `(..., d)`."""
        return w @ self.components.T / self.scale


def squared_row_norms(features: np.ndarray) -> np.ndarray:
    """Squared norm of each row of features `(n, d)`, `(n,)`, float64."""
    return np.concatenate([np.einsum("ij,ij->i", block, block) for _, block in _blocks(features)])


def _blocks(features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """First row and float64 copy of consecutive blocks of rows."""
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
