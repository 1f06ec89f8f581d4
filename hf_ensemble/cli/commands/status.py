"""`hf-ensemble status`: how far the stages of a run are, which jobs on a cluster may run side by side."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ...runs import RunDirectory, run_progress
from ..arguments import needed
from ..parsing import parse
from ..saved_arguments import StatusArguments
from ..tables import console


def main(argv: Sequence[str]) -> dict[str, Any]:
    """List the stages of a run, whether or not processes work in it.

    Returns:
        `dict`: the run, and of each stage name, status, the stages that it needs still, and details.

    Raises:
        `HfEnsembleError`: for a folder without a run, and damaged records.
    """
    argv = ["--run", *argv] if argv and not argv[0].startswith("-") else list(argv)
    (arguments,), _ = parse([StatusArguments], argv, command="status")
    needed("status", run=arguments.run)
    stages = run_progress(RunDirectory(arguments.run))
    table = Table(title=f"Stages of {arguments.run}")
    rows = [(stage.name, stage.status, ", ".join(stage.needs), stage.detail) for stage in stages]
    for name, column in zip(("stage", "status", "needs", "detail"), zip(*rows)):
        # A run that has ended needs nothing.
        if any(column):
            table.add_column(name)
    for row in zip(*filter(any, zip(*rows))):
        table.add_row(*row)
    console().print(table)
    return {"run": arguments.run, "stages": [asdict(stage) for stage in stages]}
