"""`hf-ensemble capture`: the gradients of all datasets, which every choice is made from."""

from collections.abc import Sequence
from typing import Any

from ...runs.progress import GRADIENTS
from ...store import num_shards
from ..arguments import CaptureArguments
from ..tables import console
from ..trainers import started


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Capture gradients; goes on where it was stopped.

    Returns:
        `dict`: the store, the number of its rows and of their features, and the tasks; of a part, the number of shards
        that are there.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    begun = started(CaptureArguments, argv, "capture")
    arguments, trainer = begun.arguments, begun.trainer
    if arguments.shard is not None:
        trainer.run_stage(GRADIENTS, arguments.shard)
        run = trainer.run_directory
        there, count = num_shards(run.gradients)
        console().print(f"Captured: {there} of {count} shards\nStore: {run.gradients}", soft_wrap=True)
        return {"run": str(run.path), "store": str(run.gradients), "shards": there, "num_shards": count}
    store = trainer.capture()
    made = {
        "run": str(trainer.run_directory.path),
        "store": str(trainer.run_directory.gradients),
        "rows": len(store),
        "features": store.dim,
        "tasks": list(store.task_names),
    }
    console().print(
        f"Captured {made['rows']} rows of {len(made['tasks'])} tasks, {made['features']} features each.\n"
        f"Store: {made['store']}",
        soft_wrap=True,
    )
    return made
