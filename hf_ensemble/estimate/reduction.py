"""Capture wide, solve narrow: principal components of the gradient features."""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from ..errors import EstimationError


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
        if not np.isfinite(features).all():
            raise EstimationError(
                f"Row {int(np.argmin(np.isfinite(features).all(axis=1)))} has a feature that is not finite."
            )
        scale = float(np.linalg.norm(features, axis=1).mean())
        if scale == 0:
            raise EstimationError("Every gradient feature is zero: at this point no example moves the adapter.")
        n, d = features.shape
        k = min(num_components, n, d)
        x = features.astype(np.float64) / scale
        if d <= n:
            _, vectors = eigh(x.T @ x, subset_by_index=[d - k, d - 1])
            components = vectors[:, ::-1]
        else:
            values, vectors = eigh(x @ x.T, subset_by_index=[n - k, n - 1])
            kept = values > values[-1] * 1e-12
            components = (x.T @ (vectors[:, kept] / np.sqrt(values[kept])))[:, ::-1]
        return cls(scale, np.ascontiguousarray(components))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Features `(n, d)` to components `(n, k)`, float64."""
        return (features @ self.components.astype(features.dtype)).astype(np.float64) / self.scale

    def restore(self, w: np.ndarray) -> np.ndarray:
        """Coefficients of the components `(..., k)` to coefficients of the captured features `(..., d)`."""
        return w @ self.components.T / self.scale
