"""The generated features and penalties of the solver's study."""

import numpy as np

from hf_ensemble.estimate import FeatureReduction
from hf_ensemble.tasks.sampling import epoch_length

COMPONENTS = 400
# Roughly what the evidence chooses on real tasks.
L2_SCALE = 1.0


def world(tasks: int, rows: int, validation_rows: int = 0, seed: int = 0):
    """Components, margins and task indices of training and validation rows."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, COMPONENTS + 1) ** -0.5
    mean = 0.5 * spread * rng.normal(size=(tasks, COMPONENTS))
    own_spread = spread * np.exp(0.5 * rng.normal(size=(tasks, COMPONENTS)))

    def table(count):
        task = np.repeat(np.arange(tasks), count)
        features = rng.normal(size=(len(task), COMPONENTS)) * own_spread[task] + mean[task]
        return features, 1.5 * rng.normal(size=len(task)), task

    train, validation = table(rows), table(validation_rows)
    reduction = FeatureReduction.fit(train[0], COMPONENTS)
    return [(reduction.apply(features), margin, task) for features, margin, task in (train, validation)]


def penalties(mixtures: np.ndarray, rows: int) -> np.ndarray:
    counts = np.full(mixtures.shape[1], rows)
    # It falls a little faster than the length of an epoch grows.
    return L2_SCALE / counts.sum() * (counts.sum() / epoch_length(mixtures, counts)) ** 1.25
