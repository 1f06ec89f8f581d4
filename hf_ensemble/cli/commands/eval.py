"""`hf-ensemble eval`: scores of a finished run on the rows of a split."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ...errors import ConfigurationError
from ...evaluate import TaskScores
from ...runs import Evaluation, RunDirectory
from ...runs.systems import system_name
from ...train.flows.stages import announce
from ..arguments import EvalArguments
from ..tables import console
from ..trainers import started


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Score every system of the run on every task.

    Returns:
        `dict`: the split, and loss, accuracy and further metrics by system and task.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models, and for a run that is not finished.
    """
    begun = started(EvalArguments, argv, "eval")
    split, trainer = begun.arguments.split, begun.trainer
    if not RunDirectory(trainer.args.output_dir).has(Evaluation):
        raise ConfigurationError(
            f"Expected a finished run in {trainer.args.output_dir!r}, found none. Use hf-ensemble run first."
        )
    rows = trainer.tasks.split(split)
    trainer.train()
    announce(f"Next: evaluation on {split} rows", with_bars=not trainer.args.disable_tqdm)
    trainer.evaluate(rows, metric_key_prefix=split)
    scores = trainer.run_directory.read(Evaluation).scores[split]
    console().print(_table(split, scores))
    return {
        "split": split,
        "scores": {
            system: {task: {"loss": own.loss, "accuracy": own.accuracy, **own.metrics} for task, own in by_task.items()}
            for system, by_task in scores.items()
        },
    }


def _table(split: str, scores: dict[str, dict[str, TaskScores]]) -> Table:
    table = Table(title=f"Loss (accuracy) on {split} rows")
    table.add_column("task")
    for system in scores:
        table.add_column(system_name(system), justify="right")
    for task in next(iter(scores.values())):
        table.add_row(task, *(f"{own[task].loss:.4f} ({own[task].accuracy:.3f})" for own in scores.values()))
    return table
