"""`hf-ensemble fidelity`: how far predictions can be trusted on these tasks, with this model and recipe."""

from collections.abc import Sequence

from ...publish import fidelity_picture
from ...runs import FidelityReport
from ...train import measure_fidelity
from ..arguments import FidelityArguments
from ..tables import console, fidelity_summary, fidelity_table
from ..trainers import started


def main(argv: Sequence[str]) -> FidelityReport:
    """Fine-tune random subsets and report how well they were predicted; resumes where it was stopped.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    begun = started(FidelityArguments, argv, "fidelity")
    arguments, trainer = begun.arguments, begun.trainer
    report = measure_fidelity(
        trainer,
        arguments.fidelity_subsets,
        arguments.fidelity_sizes,
        num_repeated=arguments.num_repeated,
        num_first_order=arguments.num_first_order,
        seed=arguments.subset_seed,
    )
    run = trainer.run_directory
    fidelity_picture(report, run.fidelity_picture)
    out = console()
    out.print(fidelity_table(report))
    out.print(fidelity_summary(report))
    out.print(f"Report: {run.where(FidelityReport)}\nPicture: {run.fidelity_picture}", soft_wrap=True)
    return report
