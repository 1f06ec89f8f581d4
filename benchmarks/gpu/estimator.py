"""Predictions for many subsets and the reduction of many features on a device, next to the CPU."""

import time

import numpy as np
import torch

from hf_ensemble import SubsetEstimator
from hf_ensemble.estimate import FeatureReduction
from hf_ensemble.store import FeatureTable

from ..common import random_subsets
from ..solver.world import COMPONENTS, L2_SCALE, world
from .clocks import seconds

# Rows and features of the matrix that is reduced.
REDUCED, REDUCED_TINY = (20_000, 4096), (200, 32)


def measure(device: torch.device, tiny: bool, layers: int | None) -> dict:
    """Seconds on the CPU and on the device, and how far their results differ. Layers do not matter."""
    subsets, tasks, rows = (20, 6, 20) if tiny else (1000, 40, 250)
    names = tuple(f"task_{index}" for index in range(tasks))
    tables = [
        FeatureTable(features, margin, task, names, np.array([str(i) for i in range(len(task))]))
        for features, margin, task in world(tasks, rows, validation_rows=100)
    ]
    mixtures = random_subsets(subsets, tasks, tasks // 2, seed=1).astype(np.float64)
    times, losses = {}, []
    for name, own in (("CPU", torch.device("cpu")), ("device", device)):
        start = time.perf_counter()
        estimator = SubsetEstimator(*tables, COMPONENTS, device=own)
        made = time.perf_counter() - start
        # Kernels are loaded, and memory is allocated, at the first call.
        first = seconds(lambda one=estimator: one.predict(mixtures[:2], L2_SCALE), own)
        taken = [
            seconds(lambda one=estimator: losses.append(one.predict(mixtures, L2_SCALE).loss), own) for _ in range(3)
        ]
        times[name] = {"seconds_to_make": made, "first_seconds": first, "seconds": taken}
    return {
        "subsets": subsets,
        "tasks": tasks,
        "tasks_in_a_subset": tasks // 2,
        "rows_of_a_task": rows,
        "components": COMPONENTS,
        "threads": torch.get_num_threads(),
        "predictions": times,
        "loss_difference": float(np.abs(losses[0] - losses[-1]).max()),
        "reduction": _reduction(device, REDUCED_TINY if tiny else REDUCED),
    }


def _reduction(device: torch.device, shape: tuple[int, int]) -> dict:
    rng = np.random.default_rng(0)
    features = rng.standard_normal(shape, dtype=np.float32) * np.arange(1, shape[1] + 1, dtype=np.float32) ** -0.5
    components = min(COMPONENTS, shape[1] // 2)
    found, times = {}, {}
    for name, own in (("CPU", torch.device("cpu")), ("device", device)):

        def fit(name=name, own=own) -> None:
            found[name] = FeatureReduction.fit(features, components, own)

        times[name] = [seconds(fit, own) for _ in range(2 if own.type == "cuda" else 1)]
    return {"rows": shape[0], "features": shape[1], "components": components, "seconds": times, **_difference(found)}


def _difference(found: dict[str, FeatureReduction]) -> dict:
    """Largest difference of the projections onto the components, relative to 1; a component's sign is free."""
    here, there = found["CPU"].components, found["device"].components
    cosines = np.linalg.svd(here.T @ there, compute_uv=False)
    return {"subspace_difference": float(1 - cosines.min())}
