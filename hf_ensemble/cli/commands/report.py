"""`hf-ensemble report`: the page of a run, from its records."""

from collections.abc import Sequence

from ...publish import write_report
from ..arguments import needed
from ..parsing import parse
from ..saved_arguments import ReportArguments
from ..tables import console


def main(argv: Sequence[str]) -> dict[str, str]:
    """Write the page of a run that was trained before.

    Returns:
        `dict`: the file.

    Raises:
        `HfEnsembleError`: for a folder without a run, and damaged records.
    """
    argv = ["--run", *argv] if argv and not argv[0].startswith("-") else list(argv)
    (arguments,), _ = parse([ReportArguments], argv, command="report")
    needed("report", run=arguments.run)
    path = write_report(arguments.run, arguments.output)
    console().print(f"Report: {path}", soft_wrap=True)
    return {"report": str(path)}
