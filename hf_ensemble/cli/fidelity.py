"""`hf-ensemble fidelity`: how far the estimates are to be trusted on these tasks, with this model and recipe."""

from collections.abc import Sequence
from pathlib import Path

from trl import ModelConfig

from ..publish import fidelity_picture
from ..train import EnsembleSFTConfig, FidelityReport, measure_fidelity
from .arguments import FidelityArguments, parse, with_config
from .report import console, fidelity_summary, fidelity_table
from .trainers import build_trainer, load_tasks


def fidelity(argv: Sequence[str]) -> FidelityReport:
    """Fine-tune random subsets for real and report how well they were predicted; goes on where it was stopped.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    if {"-h", "--help"} & set(argv):
        parse([FidelityArguments, ModelConfig, EnsembleSFTConfig], ["--help"], command="fidelity")
    (arguments, model_arguments), flags = parse([FidelityArguments, ModelConfig], with_config(argv), True)
    tasks = load_tasks(arguments, model_arguments, "fidelity")
    trainer = build_trainer(arguments, model_arguments, tasks, flags)
    report = measure_fidelity(
        trainer,
        arguments.num_subsets,
        arguments.subset_sizes,
        num_repeated=arguments.num_repeated,
        num_transplanted=arguments.num_transplanted,
        seed=arguments.subset_seed,
    )
    folder = Path(trainer.args.output_dir) / "estimate"
    fidelity_picture(report, folder / "fidelity.png")
    out = console()
    out.print(fidelity_table(report))
    out.print(fidelity_summary(report))
    out.print(f"Report: {folder / 'fidelity.json'}\nPicture: {folder / 'fidelity.png'}", soft_wrap=True)
    return report
