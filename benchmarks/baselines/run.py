"""What do an ensemble and every simpler system come to, in loss and in answers, over several seeds?

    python -m benchmarks.baselines.run OUTPUT --output_dir OUT [--budget 2] [--baselines longer wider]
    python -m benchmarks.baselines.run OUTPUT --data DATA --output_dir OUT FLAGS

Without `--data`, on the generated skills of the study `chain_of_thought`, which reason before they answer: a small
Llama has seen most of the arithmetic done wrong, and is fine-tuned on the ten sound skills; answers are generated and
compared with the right ones. With it, on the tasks of DATA, of which each seed draws other rows; FLAGS are those of
`hf-ensemble compare`. All seeds have the same test rows. What is reported is the comparison that `hf-ensemble compare`
makes, once for each seed, in OUT, where a killed study goes on.
"""

from pathlib import Path

import numpy as np
from datasets import disable_progress_bars

from hf_ensemble.evaluate import system_intervals
from hf_ensemble.runs import Comparison, RunDirectory, TasksRecord
from hf_ensemble.runs.systems import BASELINE
from hf_ensemble.select import Grouping
from hf_ensemble.train import BaselineComparison

from ..common import drawn_tasks, make_parser, rows_over_seeds, shape_of, write_results
from ..skills import CORRUPTED, SKILLS, rows
from ..skills_trainer import METRIC, pretrained, skills_ensemble
from ..trainers import run_command
from .table import table


def skills_run(settings, seed: int) -> RunDirectory:
    """The run of an ensemble over the skills, compared."""
    base = pretrained(settings.output_dir / "base", settings.pretraining_rows)
    names = [name for name in SKILLS if name not in CORRUPTED]
    splits = {
        "train": {name: rows(name, settings.rows, f"train{seed}") for name in names},
        "validation": {name: rows(name, settings.validation_rows, f"validation{seed}") for name in names},
        "test": {name: rows(name, settings.test_rows, "test") for name in names},
    }
    folder = settings.output_dir / f"seed-{seed}-budget-{settings.budget:g}"
    options = {"compute_budget": settings.budget, "num_train_epochs": settings.epochs}
    trainer = skills_ensemble(base, folder, seed, splits, METRIC, **options)
    BaselineComparison(trainer, settings.baselines).run()
    return trainer.run_directory


def tasks_run(settings, seed: int, flags: list[str]) -> RunDirectory:
    """The run of `hf-ensemble compare` over the tasks' rows of a seed."""
    folder = settings.output_dir / f"seed-{seed}-budget-{settings.budget:g}"
    same, tasks = settings.output_dir / "test_rows", settings.output_dir / f"tasks-{seed}"
    for data, drawn, limits, own_seed in (
        (settings.data, same, {"test": settings.test_rows}, 0),
        (same, tasks, {"train": settings.rows, "validation": settings.validation_rows}, seed),
    ):
        if not drawn.is_dir():
            drawn_tasks(data, drawn.with_suffix(".part"), limits, own_seed, settings.tasks).rename(drawn)
    given = {"--data": tasks, "--output_dir": folder, "--seed": seed, "--compute_budget": settings.budget}
    flags = [*flags, *(str(word) for pair in given.items() for word in pair)]
    names = [settings.baselines] if isinstance(settings.baselines, str) else settings.baselines
    return RunDirectory(run_command("compare", [*flags, "--baselines", *names]))


def summary(comparisons: list[Comparison]) -> list[dict]:
    """Every system's figures, costs, and differences from one adapter for all, over the seeds."""
    names, found = list(comparisons[0].systems), []
    of_rows = {
        name: rows_over_seeds(
            [{task: one.as_scores() for task, one in own.systems[name].rows.items()} for own in comparisons]
        )
        for name in names
    }
    intervals = system_intervals(of_rows, BASELINE)
    for name in names:
        figures = [own.mean(name).figures() for own in comparisons]
        costs = [(own.systems[name].cost, own.systems[BASELINE].cost) for own in comparisons]
        differences = intervals[name].mean_difference
        found.append(
            {
                "system": name,
                "figures": {figure: [own[figure] for own in figures] for figure in figures[0]},
                "tasks": {
                    task: {figure: float(values.mean()) for figure, values in own.figures().items()}
                    for task, own in of_rows[name].items()
                },
                "differences": {figure: [own.value, *own.interval] for figure, own in differences.items()},
                "training_cost": float(np.mean([own.training_flops / one.training_flops for own, one in costs])),
                "stored_parameters": float(
                    np.mean([own.stored_parameters / one.stored_parameters for own, one in costs])
                ),
                "notes": [own.systems[name].note for own in comparisons],
            }
        )
    return found


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="of the runs")
    parser.add_argument("--data", type=Path, help="folder of tasks; the generated skills by default")
    parser.add_argument("--tasks", nargs="+", help="tasks of DATA; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of rows and trainings")
    parser.add_argument("--budget", type=float, default=2.0, help="of the ensemble; one adapter for all costs 1")
    parser.add_argument("--baselines", nargs="+", default="all", help="some of them; all by default")
    parser.add_argument("--rows", type=int, default=60, help="training rows per task")
    parser.add_argument("--validation_rows", type=int, default=100, help="validation rows per task")
    parser.add_argument("--test_rows", type=int, default=200, help="test rows per task")
    parser.add_argument("--epochs", type=float, default=3, help="of each training on skills")
    parser.add_argument("--pretraining_rows", type=int, default=40_000, help="that the skills' model has read")
    settings, flags = parser.parse_known_args()
    if settings.data is None and flags:
        parser.error(f"Flags of `hf-ensemble compare` go with --data: {' '.join(flags)}")
    disable_progress_bars()
    runs = [
        skills_run(settings, seed) if settings.data is None else tasks_run(settings, seed, flags)
        for seed in settings.seeds
    ]
    comparisons = [run.read(Comparison) for run in runs]
    results = {
        "shape": shape_of(settings, "output_dir", "data"),
        "split": comparisons[0].split,
        "groups": [len(run.read(Grouping).groups) for run in runs],
        "train_rows": {name: own.num_rows["train"] for name, own in runs[0].read(TasksRecord).tasks.items()},
        "systems": summary(comparisons),
        "left_out": comparisons[0].left_out,
    }
    write_results(settings.output, results, table)


if __name__ == "__main__":
    main()
