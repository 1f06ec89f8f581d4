"""Are tasks with opposite answers to the same questions told apart, and does it matter to the model?

    python -m benchmarks.conflicts.run OUTPUT FLAGS

Two pairs of instruction tasks ask for opposites: the right or the wrong ending of a story, and turning a contradiction
into an entailment or the reverse. Instructions are removed from the prompts, so that only the answers differ.
Reported for each task: what forward selection takes, and the predicted and true loss after training on the task, on its
opposite and on both. FLAGS are those of `hf-ensemble fidelity`; --tasks may name more tasks to choose from.
"""

from pathlib import Path

from hf_ensemble.select import GROUPING_METHODS

from ..common import make_parser, read_rows, write_results, write_rows
from ..trainers import flag_value, trainer_from_flags
from .table import table

PAIRS = [
    (
        "ni_task215_rocstories_incorrect_answer_generation",
        "ni_task216_rocstories_correct_answer_generation",
    ),
    (
        "ni_task186_snli_contradiction_to_entailment_text_modification",
        "ni_task187_snli_entailment_to_contradiction_text_modification",
    ),
]


def strip_instructions(source: Path, target: Path) -> None:
    """Copy tasks, cutting each prompt to what follows its first "Input:"."""
    for file in sorted(source.glob("*/*.jsonl")):
        rows = read_rows(file)
        for row in rows:
            _, found, question = row["prompt"].partition("Input:")
            row["prompt"] = found + question if found else row["prompt"]
        write_rows(target / file.relative_to(source), rows)


def outcome(trainer, selector, task: str, opposite: str) -> dict:
    """Predicted and true losses of a task, and the tasks selected for it."""
    estimator = selector.estimator
    subsets = [[task], [opposite], [task, opposite]]
    column = estimator.task_names.index(task)
    chosen = selector.select(task)
    return {
        "task": task,
        "opposite": opposite,
        "base_loss": float(estimator.base_loss()[column]),
        "predicted": estimator.predict_subsets(subsets).loss[:, column].tolist(),
        "true": [trainer.flow.calibration.scored_run(subset).scores[task].loss for subset in subsets],
        "selection": chosen.auxiliary,
        "takes_opposite": opposite in chosen.tasks,
    }


def main() -> None:
    own, flags = make_parser(__file__, __doc__).parse_known_args()
    stripped = Path(flag_value(flags, "--output_dir")) / "stripped"
    strip_instructions(Path(flag_value(flags, "--data")), stripped)
    trainer, _ = trainer_from_flags([*flags, "--data", str(stripped)])
    selector = trainer.selector()
    tasks = [outcome(trainer, selector, *pair[::step]) for pair in PAIRS for step in (1, -1)]
    groupings = {
        f"{method}, {count or 'auto'}": list(selector.group(count, method).groups.values())
        for method in GROUPING_METHODS
        for count in (None, 3)
    }
    together = {
        name: [pair[0] for pair in PAIRS if any(set(pair) <= set(group) for group in groups)]
        for name, groups in groupings.items()
    }
    results = {"tasks": tasks, "groupings": groupings, "pairs_together": together}
    write_results(own.output, results, table)


if __name__ == "__main__":
    main()
