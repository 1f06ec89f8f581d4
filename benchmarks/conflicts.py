"""Tasks with opposite answers to the same questions: are they told apart, and does it matter to the model?

    python benchmarks/conflicts.py TARGET --data DIR/instructions FLAGS

Two pairs of instruction tasks want opposite things: a story's right or wrong ending, and a contradiction turned into an
entailment or the other way round. Their instruction is taken off the prompts, so that only the answers tell them apart.
For each task: what forward selection takes, with which the predicted loss would be, and what truly fine-tuning on the
task, on its opposite and on both makes of its loss. FLAGS are those of `hf-ensemble fidelity`; further tasks of --tasks
are company. Writes TARGET.json and .md.
"""

import argparse
import json
from pathlib import Path

from trl import ModelConfig

from hf_ensemble.cli.arguments import FidelityArguments, parse, with_config
from hf_ensemble.cli.trainers import build_trainer, load_tasks
from hf_ensemble.select import GROUPING_METHODS
from hf_ensemble.train.scored_runs import scored_run

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
SPLITS = ("train", "validation", "test")


def stripped(data: Path, names: list[str], target: Path) -> None:
    """The tasks with only what follows the first "Input:" of a prompt."""
    for name in names:
        for split in SPLITS:
            rows = [json.loads(line) for line in (data / name / f"{split}.jsonl").read_text().splitlines()]
            for row in rows:
                _, found, question = row["prompt"].partition("Input:")
                row["prompt"] = found + question if found else row["prompt"]
            file = target / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    own, flags = parser.parse_known_args()
    (arguments, model_arguments), flags = parse([FidelityArguments, ModelConfig], with_config(flags), True)
    out = Path(flags[flags.index("--output_dir") + 1])
    stripped(Path(arguments.data), arguments.tasks, out / "stripped")
    arguments.data = str(out / "stripped")
    trainer = build_trainer(arguments, model_arguments, load_tasks(arguments, model_arguments, "fidelity"), flags)
    selector = trainer.selector(trainer.capture())
    estimator = selector.estimator
    base = dict(zip(estimator.task_names, estimator.base_loss().tolist()))
    rows = []
    for task, opposite in [pair[::step] for pair in PAIRS for step in (1, -1)]:
        subsets = [[task], [opposite], [task, opposite]]
        column = estimator.task_names.index(task)
        chosen = selector.select(task)
        rows.append(
            {
                "task": task,
                "opposite": opposite,
                "base_loss": base[task],
                "predicted": estimator.predict_subsets(subsets).loss[:, column].tolist(),
                "true": [scored_run(trainer, subset).scores[task]["loss"] for subset in subsets],
                "selection": chosen.auxiliary,
                "takes_opposite": opposite in chosen.tasks,
            }
        )
    groupings = {
        f"{method}, {count}": list(selector.group(None if count == "auto" else count, method).groups.values())
        for method in GROUPING_METHODS
        for count in ("auto", 3)
    }
    together = {
        name: [pair[0] for pair in PAIRS if any(set(pair) <= set(tasks) for tasks in groups)]
        for name, groups in groupings.items()
    }
    report = {"tasks": rows, "groupings": groupings, "pairs_together": together}
    own.target.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        "Validation loss of a task at the base, and trained on the task, on its opposite, on both: predicted / true.",
        "",
        "| task | base | on itself | on its opposite | on both | selection takes the opposite |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{predicted:.3f} / {true:.3f}" for predicted, true in zip(row["predicted"], row["true"])]
        taken = "yes" if row["takes_opposite"] else "no"
        lines.append(f"| {row['task']} | {row['base_loss']:.3f} | {' | '.join(cells)} | {taken} |")
    lines += ["", "| grouping | pairs in one group |", "|---|---|"]
    lines += [f"| {name} | {len(pairs)} of {len(PAIRS)} |" for name, pairs in together.items()]
    own.target.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
