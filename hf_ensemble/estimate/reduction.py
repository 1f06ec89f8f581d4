"""Principal components of the gradient features.

Features may be a store's or a memory map of any float type: they are read in blocks and never copied as a whole. What
stays is their components in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh

from ..errors import EstimationError
from ..store import Features, column_blocks, row_blocks, take_rows

# From this many rows a feature on, principal directions may be those of some rows.
_ROWS_PER_FEATURE = 8


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
    def fit(
        cls,
        features: Features,
        num_components: int,
        device: torch.device | str | None = None,
        most_rows: int | None = None,
    ) -> "FeatureReduction":
        """Compute the leading principal directions of training features `(n, d)`, without centering.

        The surrogate's optimum is a linear combination of the training rows, so as many components as rows lose
        nothing. The features are not centered, because the surrogate has no intercept to absorb their mean.

        Args:
            features (`np.ndarray` or [`StoredFeatures`] of shape `(n, d)`): training features.
            num_components (`int`): number of directions.
            device (`torch.device` or `str`, *optional*):
                Device for the products and eigenvectors, with float64, where there are at least as many rows as
                features. The CPU by default.
            most_rows (`int`, *optional*):
                Number of evenly spaced rows that directions and scale are computed from, where there are more, and more
                than eight times as many as features: they tell the directions as well. All rows by default.

        Raises:
            `EstimationError`: for features that are not finite or all zero.
        """
        n, d = features.shape
        if most_rows is not None and n > (used := max(most_rows, _ROWS_PER_FEATURE * d)):
            features = take_rows(features, np.linspace(0, n - 1, used).round().astype(int))
            n = used
        device = torch.device("cpu" if device is None or d > n else device)
        gram, norms = np.zeros((min(n, d), min(n, d))), 0.0
        total = None if device.type == "cpu" else torch.zeros(d, d, dtype=torch.float64, device=device)
        for part, block in _blocks(features):
            norms += _sum_of_norms(part.start, block)
            if total is not None:
                there = torch.from_numpy(block).to(device)
                total.addmm_(there.T, there)
            elif d <= n:
                gram += block.T @ block
        scale = norms / n
        if scale == 0:
            raise EstimationError(
                "Expected nonzero gradient features, found zeros only. Check that the adapter is active."
            )
        k = min(num_components, n, d)
        if total is not None:
            components = torch.linalg.eigh(total)[1][:, -k:].flip(1).cpu().numpy()
        elif d <= n:
            _, vectors = eigh(gram, subset_by_index=[d - k, d - 1], overwrite_a=True)
            components = vectors[:, ::-1]
        else:
            for block in column_blocks(features):
                block = block.astype(np.float64)
                gram += block @ block.T
            values, vectors = eigh(gram, subset_by_index=[n - k, n - 1], overwrite_a=True)
            kept = values > values[-1] * 1e-12
            left = vectors[:, kept] / np.sqrt(values[kept])
            right = np.zeros((d, int(kept.sum())))
            for part, block in _blocks(features):
                right += block.T @ left[part]
            components = right[:, ::-1]
        return cls(float(scale), np.ascontiguousarray(components))

    def apply(self, features: Features) -> np.ndarray:
        """Map features `(n, d)` to components `(n, k)`, float32."""
        out = np.empty((len(features), self.components.shape[1]), dtype=np.float32)
        for part, block in _blocks(features):
            out[part] = block @ self.components / self.scale
        return out

    def restore(self, w: np.ndarray) -> np.ndarray:
        """Map coefficients `(..., k)` of the components to coefficients `(..., d)` of the captured features."""
        return w @ self.components.T / self.scale


def squared_row_norms(features: Features) -> np.ndarray:
    """Squared row norms `(n,)` of features `(n, d)`, float64."""
    return np.concatenate([np.einsum("ij,ij->i", block, block) for _, block in _blocks(features)])


def _blocks(features: Features) -> Iterator[tuple[slice, np.ndarray]]:
    """Consecutive blocks of rows in float64."""
    for part, block in row_blocks(features):
        yield part, block.astype(np.float64)


def _sum_of_norms(start: int, block: np.ndarray) -> float:
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise EstimationError(f"Row {start + int(np.argmin(finite))} has a feature that is not finite.")
    return float(np.linalg.norm(block, axis=1).sum())
