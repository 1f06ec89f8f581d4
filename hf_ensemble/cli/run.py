"""`hf-ensemble run`: a folder of tasks and a model path, to a saved and documented ensemble."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl import ModelConfig

from .._compat import package_versions
from .._files import read_json, write_json
from ..tasks import TaskSet
from ..train import EnsembleSFTConfig, measure_fidelity
from .arguments import RunArguments, parse, with_config
from .report import console, fidelity_table, grouping_table, path_table, results_table, selection_table
from .trainers import build_trainer, load_tasks


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Run the whole flow; returns what `results.json` holds.

    Raises:
        `HfEnsembleError`: for bad arguments, tasks or models.
    """
    if {"-h", "--help"} & set(argv):
        # The trainer's arguments are known once the data are; those of the ensemble trainers are the fullest.
        parse([RunArguments, ModelConfig, EnsembleSFTConfig], ["--help"])
    (arguments, model_arguments), remaining = parse([RunArguments, ModelConfig], with_config(argv), True)
    tasks = load_tasks(arguments, model_arguments, "run")
    trainer = build_trainer(arguments, model_arguments, tasks, remaining, arguments.target)
    trainer.train()
    results = collect_results(trainer, tasks, arguments)
    write_json(Path(trainer.args.output_dir) / "results.json", results)
    report(trainer, results)
    return results


def collect_results(trainer, tasks: TaskSet, arguments: RunArguments) -> dict[str, Any]:
    """Scores of every system on test rows (evaluation rows where a task has none), groups and fidelity."""
    split = "test" if tasks.has_split("test") else "eval"
    raw = tasks.split("test") if split == "test" else None
    if split == "test":
        trainer.evaluate(raw, metric_key_prefix="test")
    scores = read_json(Path(trainer.args.output_dir) / "evaluation.json")[split]
    datasets = trainer.eval_dataset if raw is None else trainer.prepare_rows(raw)
    scores = {"base": trainer.score_adapter(None, datasets, "Evaluating base"), **scores}
    results: dict[str, Any] = {
        "split": split,
        "scores": scores,
        "mean_accuracy": {
            system: sum(score["accuracy"] for score in by_task.values()) / len(by_task)
            for system, by_task in scores.items()
        },
        "configuration": trainer.run_directory.record["configuration"],
        "versions": package_versions(),
        "stage_seconds": {name: stage.get("seconds") for name, stage in trainer.run_directory.record["stages"].items()},
    }
    if arguments.target is None:
        results["groups"] = trainer.grouping.groups
        results["weights"] = trainer.ensemble.weights
    else:
        results["selection"] = {
            "target": trainer.target,
            "tasks": trainer.selection.tasks,
            "summary": trainer.selection.summary,
        }
    if arguments.fidelity_subsets:
        sizes = [arguments.fidelity_subset_size] if arguments.fidelity_subset_size else None
        trainer.fidelity = measure_fidelity(trainer, arguments.fidelity_subsets, sizes, seed=trainer.args.seed)
        results["fidelity"] = read_json(Path(trainer.args.output_dir) / "estimate" / "fidelity.json")
    return results


def report(trainer, results: dict[str, Any]) -> None:
    """The tables at the end."""
    out = console()
    folder = Path(trainer.args.output_dir)
    if "groups" in results:
        out.print(grouping_table(trainer.grouping, trainer.ensemble))
    else:
        out.print(path_table(trainer.selection))
        out.print(selection_table(trainer.selection))
    out.print(results_table(results["scores"], results["split"]))
    if "fidelity" in results:
        out.print(fidelity_table(trainer.fidelity))
    saved = folder / ("ensemble" if "groups" in results else "adapter")
    out.print(f"Saved: {saved}\nResults: {folder / 'results.json'}", soft_wrap=True)
    if "groups" in results:
        out.print(f"Model card: {folder / 'ensemble' / 'README.md'}", soft_wrap=True)
