"""Directions of gradients, which k-means clusters."""

import numpy as np


def unit_directions(vectors: np.ndarray) -> tuple[np.ndarray, int]:
    """Vectors `(n, d)` divided by their norms, and how many of them differ: k-means warns above as many clusters."""
    directions = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    # Zeros have two signs.
    return directions, len({hash((row.round(6) + 0.0).tobytes()) for row in directions})
