"""`hf-ensemble compare`: an ensemble beside the simpler systems that it has to beat."""

from collections.abc import Sequence

from ...errors import ConfigurationError
from ...runs import Comparison
from ...train import BaselineComparison
from ..arguments import CompareArguments
from ..tables import comparison_table, console
from ..trainers import started


def main(argv: Sequence[str]) -> Comparison:
    """Train and score every system; resumes where it was stopped, and takes the adapters of a finished run.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    begun = started(CompareArguments, argv, "compare")
    arguments, trainer = begun.arguments, begun.trainer
    if (arguments.num_compared_groups or 0) > len(trainer.tasks):
        raise ConfigurationError(
            f"Expected num_compared_groups up to the number of datasets, {len(trainer.tasks)}, found "
            f"{arguments.num_compared_groups}."
        )
    comparison = BaselineComparison(
        trainer,
        arguments.baselines,
        arguments.finetuned_length,
        arguments.num_compared_groups,
        arguments.num_compared_seeds,
        arguments.group_seed,
    ).run()
    run = trainer.run_directory
    out = console()
    out.print(comparison_table(comparison))
    out.print(f"Comparison: {run.where(Comparison)}\nTable: {run.comparison_table}", soft_wrap=True)
    return comparison
