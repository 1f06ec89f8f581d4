"""How much memory and time does a large estimate take: 100 tasks of 1,000 rows, 10,000 subsets?

    python -m benchmarks.estimator_memory.run OUTPUT
    python -m benchmarks.estimator_memory.run OUTPUT --rows 10000 --subsets 20 --folder WHERE_8_GB_ARE_FREE

A store of float16 features is generated shard by shard in a process of its own, and deleted afterwards. A training on
all tasks is taken to lower every loss by a fifth; with `--replay` it is replayed instead.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hf_ensemble import DataSelector, GradientStore, ObservedRun, TrainingRecipe
from hf_ensemble.store import CapturedRows, GradientStoreWriter

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

_LATENT = 64


def write_store(folder: str, tasks: int, rows: int, validation_rows: int, dim: int, recipe: TrainingRecipe) -> None:
    """A store of features with a decaying spectrum and a mean per task."""
    torch.set_num_threads(1)
    world = np.random.default_rng(0)
    directions = (world.normal(size=(_LATENT, dim)) * (np.arange(1, _LATENT + 1) ** -0.5)[:, None]).astype(np.float32)
    means = world.normal(size=(tasks, _LATENT)).astype(np.float32)
    sizes = {"train": rows, "validation": validation_rows}
    owner = np.concatenate([np.repeat(np.arange(tasks), size) for size in sizes.values()])
    plan = [
        (split, f"task_{task}", f"{row:08d}")
        for split, size in sizes.items()
        for task in range(tasks)
        for row in range(size)
    ]
    writer = GradientStoreWriter(Path(folder) / "store", {"data": {}, "config": {}, "model": {}}, plan, dim)
    rng = np.random.default_rng(1)
    for shard in writer.missing_shards():
        places = writer.rows_of(shard)
        latent = rng.normal(size=(len(places), _LATENT)).astype(np.float32) + 0.5 * means[owner[places]]
        noise = rng.normal(size=dim).astype(np.float32)
        margin = 1.5 * rng.normal(size=len(places))
        features = (latent @ directions + latent[:, :1] * noise) / 100
        loss, tokens = np.logaddexp(0, -margin), np.ones(len(places), dtype=int)
        writer.write_shard(shard, CapturedRows(features, margin, loss, tokens))
    writer.finish(recipe)


def measure(folder: str, arguments) -> dict:
    """Time and memory of this process for an estimate from the store in a folder."""
    torch.set_num_threads(arguments.threads)
    begun = time.perf_counter()
    store = GradientStore(Path(folder) / "store")
    rows = store.rows.select(["split", "task", "loss"]).to_pandas()
    losses = rows[rows["split"] == "validation"].groupby("task")["loss"].mean()
    run = ObservedRun(dict.fromkeys(store.task_names, 1.0), (0.8 * losses).to_dict())
    del rows
    estimator = DataSelector.from_store(store, observed_runs=[] if arguments.replay else [run]).estimator
    made = time.perf_counter() - begun
    subsets = random_subsets(arguments.subsets, arguments.tasks, arguments.size, seed=3)
    begun = time.perf_counter()
    prediction = estimator.predict(subsets)
    predicted = time.perf_counter() - begun
    return {
        **shape_of(arguments, "folder"),
        "seconds_to_reduce_and_calibrate": round(made, 1),
        "seconds_to_predict": round(predicted, 1),
        "l2_scale": estimator.regularization.l2_scale,
        "greatest_gradient_norm": float(prediction.gradient_norm.max()),
        "peak_resident_bytes": peak_memory(),
        # Without the pages of the mapped features, which the system may drop.
        "anonymous_bytes_at_the_end": process_memory("RssAnon"),
        "bytes_of_mapped_features": 2 * arguments.dim * len(store),
    }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1000, help="training rows of a task")
    parser.add_argument("--validation_rows", type=int, default=100, help="validation rows of a task")
    parser.add_argument("--dim", type=int, default=4096, help="captured dimensions")
    parser.add_argument("--subsets", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=20, help="tasks of a subset")
    parser.add_argument("--replay", action="store_true", help="replay the training instead of observing its losses")
    parser.add_argument("--folder", help="where the store goes; that of temporary files by default")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    recipe = TrainingRecipe(np.linspace(1e-3, 0, arguments.tasks * arguments.rows // 16), 16, 100_000)
    sizes = (arguments.tasks, arguments.rows, arguments.validation_rows, arguments.dim)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        with context.Pool(1) as pool:
            pool.apply(write_store, (folder, *sizes, recipe))
        with context.Pool(1) as pool:
            found = pool.apply(measure, (folder, arguments))
    write_results(arguments.output, found, table)


if __name__ == "__main__":
    main()
