"""How much memory and time does a large estimate take: 100 tasks of 1,000 rows, 10,000 subsets?

    python -m benchmarks.estimator_memory.run OUTPUT

The features are generated block by block into a float16 file, the format of a store, and memory-mapped from there.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hf_ensemble import FeatureTable, SubsetEstimator, TrainingRecipe

from ..common import (
    add_machine_flags,
    make_parser,
    peak_memory,
    process_memory,
    random_subsets,
    shape_of,
    write_results,
)
from .table import table


def mapped_table(path: Path, tasks: int, rows: int, dim: int, seed: int) -> FeatureTable:
    """Memory-mapped features with a decaying spectrum and a mean per task."""
    rng = np.random.default_rng(seed)
    world = np.random.default_rng(0)
    directions = world.normal(size=(512, dim)) * (np.arange(1, 513) ** -0.5)[:, None]
    means = world.normal(size=(tasks, 512))
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(tasks * rows, dim))
    for task in range(tasks):
        latent = rng.normal(size=(rows, 512)) + 0.5 * means[task]
        features[task * rows : (task + 1) * rows] = latent @ directions / 100
    features.flush()
    del features
    return FeatureTable(
        np.load(path, mmap_mode="r"),
        1.5 * rng.normal(size=tasks * rows),
        np.repeat(np.arange(tasks), rows),
        tuple(f"task_{task}" for task in range(tasks)),
        np.arange(tasks * rows).astype(str),
    )


def measure(arguments) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        train = mapped_table(Path(folder) / "train.npy", arguments.tasks, arguments.rows, arguments.dim, 1)
        validation = mapped_table(
            Path(folder) / "validation.npy", arguments.tasks, arguments.validation_rows, arguments.dim, 2
        )
        start = time.perf_counter()
        recipe = TrainingRecipe(np.linspace(1e-3, 0, arguments.tasks * arguments.rows // 16), 16, 100_000)
        estimator = SubsetEstimator(train, validation, recipe=recipe)
        made = time.perf_counter() - start
        subsets = random_subsets(arguments.subsets, arguments.tasks, arguments.size, seed=3)
        start = time.perf_counter()
        prediction = estimator.predict(subsets)
        predicted = time.perf_counter() - start
        return {
            **shape_of(arguments),
            "seconds_to_reduce_and_calibrate": round(made, 1),
            "seconds_to_predict": round(predicted, 1),
            "l2_scale": estimator.regularization.l2_scale,
            "greatest_gradient_norm": float(prediction.gradient_norm.max()),
            "peak_resident_bytes": peak_memory(),
            # Without the pages of the mapped features, which the system may drop.
            "anonymous_bytes_at_the_end": process_memory("RssAnon"),
            "bytes_of_mapped_features": 2 * arguments.dim * (len(train) + len(validation)),
        }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1000, help="training rows of a task")
    parser.add_argument("--validation_rows", type=int, default=100, help="validation rows of a task")
    parser.add_argument("--dim", type=int, default=4096, help="captured dimensions")
    parser.add_argument("--subsets", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=20, help="tasks of a subset")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_results(arguments.output, measure(arguments), table)


if __name__ == "__main__":
    main()
