"""`hf-ensemble capture`: the gradients of all datasets, which every choice is made from."""

from collections.abc import Sequence
from typing import Any

from ..arguments import FlowArguments
from ..tables import console
from ..trainers import started


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Capture gradients; goes on where it was stopped.

    Returns:
        `dict`: the store, the number of its rows and of their features, and the tasks.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    trainer = started(FlowArguments, argv, "capture").trainer
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
