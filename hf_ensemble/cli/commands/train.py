"""`hf-ensemble train`: a run's adapters, or one of its stages alone."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from ..._processes import run_on_main
from ..._settings import checked_shard
from ...runs import Results, RunDirectory, RunRecord, TasksRecord
from ...runs.progress import EVALUATION, wait_for_stage
from ...train import collect_results
from ...train.configuration import choices_of
from ...train.flows.stages import announce
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
    begun = started(TrainArguments, argv, "train", _wait)
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


def _wait(arguments: TrainArguments, args: TrainingArguments) -> None:
    """Wait for what a stage needs before rows are tokenized and the model is loaded, in a run that others have begun.

    The trainer waits in one that nobody has begun, and refuses one of other choices.
    """
    run = RunDirectory(args.output_dir)

    def is_begun() -> bool:
        if not (run.has(RunRecord) and run.has(TasksRecord)):
            return False
        return all(run.record.choices.get(key) == value for key, value in choices_of(args).items() if key != "target")

    if arguments.stage is None or args.overwrite_run or not run_on_main(is_begun):
        return
    shard = checked_shard("shard", arguments.shard)
    wait_for_stage(run, arguments.stage, shard, arguments.wait, lambda text: announce(text, not args.disable_tqdm))


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
