"""Memory and time of an estimate at its largest: 100 tasks of 1,000 rows, 4,096 captured dimensions, 10,000 subsets.

    python benchmarks/estimator_memory.py benchmarks/estimator_memory

writes the JSON. The features are generated block by block into a float16 file, as a store holds them, and mapped there.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hf_ensemble import FeatureTable, SubsetEstimator, TrainingRecipe


def mapped_table(path: Path, tasks: int, rows: int, dim: int, seed: int) -> FeatureTable:
    """Features with a falling spectrum and a mean per task, on disk."""
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


def anonymous_memory() -> int:
    """Bytes of this process that are its own: pages of the mapped features are the system's to drop."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--validation_rows", type=int, default=100)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--subsets", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        train = mapped_table(Path(folder) / "train.npy", arguments.tasks, arguments.rows, arguments.dim, 1)
        validation = mapped_table(
            Path(folder) / "validation.npy", arguments.tasks, arguments.validation_rows, arguments.dim, 2
        )
        start = time.perf_counter()
        recipe = TrainingRecipe(np.linspace(1e-3, 0, arguments.tasks * arguments.rows // 16), 16, 100_000)
        estimator = SubsetEstimator(train, validation, recipe=recipe)
        made = time.perf_counter() - start
        order = np.random.default_rng(3).random((arguments.subsets, arguments.tasks)).argsort(axis=1)
        start = time.perf_counter()
        prediction = estimator.predict(order < arguments.size)
        predicted = time.perf_counter() - start
        report = {
            **{key: value for key, value in vars(arguments).items() if key != "output"},
            "seconds_to_reduce_and_calibrate": round(made, 1),
            "seconds_to_predict": round(predicted, 1),
            "l2_scale": estimator.regularization.l2_scale,
            "greatest_gradient_norm": float(prediction.gradient_norm.max()),
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "anonymous_bytes_at_the_end": anonymous_memory(),
            "bytes_of_mapped_features": (arguments.rows + arguments.validation_rows)
            * arguments.tasks
            * arguments.dim
            * 2,
        }
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
