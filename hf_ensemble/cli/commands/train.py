"""`hf-ensemble train`: a run's adapters, or one of its stages alone."""

from collections.abc import Sequence
from typing import Any

from ...runs import Results
from ...runs.progress import EVALUATION
from ...train import collect_results
from ..arguments import TrainArguments
from ..tables import console
from ..trainers import Started, started
from .run import print_report


def main(argv: Sequence[str]) -> dict[str, Any] | Results:
    """Train what is asked for; what the run holds already is not trained again.

    Returns:
        `dict`: the run, its groups, and the folders of the adapters that are there; of a stage, its name. The results
        after `--stage evaluation`.

    Raises:
        `StageNotReadyError`: when what a stage needs is not there.
        `HfEnsembleError`: for bad arguments, tasks or models, and for an unknown stage.
    """
    begun = started(TrainArguments, argv, "train")
    arguments, trainer = begun.arguments, begun.trainer
    if arguments.stage is not None:
        return _stage(begun)
    if arguments.until == "groups":
        trainer.group_tasks()
    else:
        trainer.train_groups()
    run, grouping = trainer.run_directory, trainer.grouping
    adapters = {name: str(run.member(name)) for name in grouping.groups if run.member(name).is_dir()}
    out = console()
    for name, tasks in grouping.groups.items():
        out.print(f"{name}: {', '.join(tasks)} ({adapters.get(name, 'not trained yet')})", soft_wrap=True)
    return {"run": str(run.path), "groups": grouping.groups, "adapters": adapters}


def _stage(begun: Started) -> dict[str, Any] | Results:
    """Run one stage; the last one ends as `hf-ensemble run` does."""
    arguments, trainer = begun.arguments, begun.trainer
    trainer.run_stage(arguments.stage, arguments.shard, arguments.wait)
    if arguments.stage == EVALUATION:
        results = collect_results(trainer)
        print_report(trainer, results)
        return results
    made = {"run": str(trainer.run_directory.path), "stage": arguments.stage, "shard": arguments.shard}
    part = "" if arguments.shard is None else f", part {arguments.shard}"
    console().print(f"Done: {arguments.stage}{part} of {made['run']}", soft_wrap=True)
    return made
