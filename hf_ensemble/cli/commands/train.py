"""`hf-ensemble train`: a run's adapters, all of them or one group's alone."""

from collections.abc import Sequence
from typing import Any

from ..arguments import TrainArguments
from ..tables import console
from ..trainers import started


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Train what is asked for; what the run holds already is not trained again.

    Returns:
        `dict`: the run, its groups, and the folders of the adapters that are there.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models, and for an unknown group.
    """
    begun = started(TrainArguments, argv, "train")
    arguments, trainer = begun.arguments, begun.trainer
    if arguments.group is not None:
        trainer.train_group(arguments.group)
    elif arguments.until == "groups":
        trainer.group_tasks()
    else:
        trainer.train_groups()
    run, grouping = trainer.run_directory, trainer.grouping
    adapters = {name: str(run.member(name)) for name in grouping.groups if run.member(name).is_dir()}
    out = console()
    for name, tasks in grouping.groups.items():
        out.print(f"{name}: {', '.join(tasks)} ({adapters.get(name, 'not trained yet')})", soft_wrap=True)
    return {"run": str(run.path), "groups": grouping.groups, "adapters": adapters}
