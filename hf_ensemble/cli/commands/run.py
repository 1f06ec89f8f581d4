"""`hf-ensemble run`: datasets and a model, to a saved and documented ensemble or selection."""

from collections.abc import Sequence

from ...runs import Results
from ...train import collect_results, measure_fidelity
from ..arguments import RunArguments
from ..tables import console, cost_tables, fidelity_table, grouping_table, path_table, results_tables, selection_table
from ..trainers import Trainers, started


def main(argv: Sequence[str]) -> Results:
    """Run the whole flow.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    begun = started(RunArguments, argv, "run")
    arguments, trainer = begun.arguments, begun.trainer
    trainer.train()
    fidelity = None
    if arguments.fidelity_subsets:
        fidelity = measure_fidelity(
            trainer, arguments.fidelity_subsets, arguments.fidelity_sizes, seed=trainer.args.seed
        )
    results = collect_results(trainer, fidelity)
    print_report(trainer, results)
    return results


def print_report(trainer: Trainers, results: Results) -> None:
    """The tables at the end."""
    out, run = console(), trainer.run_directory
    if results.selection is None:
        out.print(grouping_table(trainer.grouping, trainer.ensemble))
    else:
        out.print(path_table(trainer.selection))
        out.print(selection_table(trainer.selection))
    for table in (*results_tables(results), *cost_tables(results)):
        out.print(table)
    out.print(results.verdict, style="bold")
    if results.fidelity is not None:
        out.print(fidelity_table(results.fidelity))
    saved = run.ensemble if results.selection is None else run.adapter
    out.print(f"Saved: {saved}\nResults: {run.where(Results)}", soft_wrap=True)
    if results.selection is None:
        out.print(f"Model card: {run.ensemble / 'README.md'}", soft_wrap=True)
