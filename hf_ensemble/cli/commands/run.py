"""`hf-ensemble run`: a folder of tasks and a model, to a saved and documented ensemble or selection."""

from collections.abc import Sequence

from trl import ModelConfig

from ...runs import Results
from ...train import EnsembleSFTConfig, collect_results, measure_fidelity
from ..arguments import FlowArguments, answer_metrics, parse, print_help, with_config
from ..tables import console, fidelity_table, grouping_table, path_table, results_tables, selection_table
from ..trainers import Trainers, build_trainer, load_tasks


def main(argv: Sequence[str]) -> Results:
    """Run the whole flow.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    # The trainer's arguments are known once the data are; those of the ensemble trainers are the fullest.
    print_help([FlowArguments, ModelConfig, EnsembleSFTConfig], argv, "run")
    (arguments, model_arguments), remaining = parse([FlowArguments, ModelConfig], with_config(argv), True)
    tasks = load_tasks(arguments, model_arguments, "run")
    metrics = answer_metrics(arguments.answer_metrics)
    trainer = build_trainer(arguments, model_arguments, tasks, remaining, arguments.target, metrics)
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
    for table in results_tables(results):
        out.print(table)
    out.print(results.verdict, style="bold", markup=False)
    if results.fidelity is not None:
        out.print(fidelity_table(results.fidelity))
    saved = run.ensemble if results.selection is None else run.adapter
    out.print(f"Saved: {saved}\nResults: {run.where(Results)}", soft_wrap=True)
    if results.selection is None:
        out.print(f"Model card: {run.ensemble / 'README.md'}", soft_wrap=True)
