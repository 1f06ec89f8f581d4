"""Runs that have begun, without a trainer."""

from hf_ensemble.runs import RunDirectory, TaskRecord, TasksRecord


def begun(folder, choices=None, **arguments):
    """A run over six tasks that holds its records alone."""
    given = {"seed": 0, "train_baseline": True, **arguments}
    own = {"calibration_runs": 1, "group_initialization": "fresh", "boosting_steps": 0, **(choices or {})}
    run = RunDirectory.open(folder, {"arguments": given}, own)
    task = TaskRecord({"train": 4}, {"train": "0"}, None, 1.0)
    run.write(TasksRecord("x", "y", dict.fromkeys("abcdef", task)))
    return run
